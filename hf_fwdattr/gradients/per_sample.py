"""Per-row gradients of summed losses, (rows, P), in one backward pass for a whole batch.

A Linear's gradient is the product of what went in and what comes back, so a hook gives every row's own gradient; LoRA
matrices are Linears, whatever the architecture around them. Any other weight goes through `vmap` over single rows. The
first batch is checked against plain autograd on one row alone: a model in which rows touch each other is refused.
Where a Linear sees rows and positions in one dimension, every batch is checked, as their order may change unnoticed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import NumericalError, UnsupportedError
from ..models.compat import fused_activations, refuse_silent_backward
from ..models.fsdp import is_piece, is_sharded
from ..models.likelihood import IGNORED, Batch, Likelihood, Objective, row_losses, sample_labels
from ..models.modes import refuse_batch_statistics, trainable
from ..models.parameters import Parameters, is_linear


# How far hooks and plain autograd may differ on one row, relative to that row's gradient, by what layers compute in.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


def refuse_sharded_rest(model: nn.Module, parameters: Parameters) -> None:
    """Refuse responding weights that are sharded and that hooks on Linear layers cannot serve.

    Raises:
        UnsupportedError: names the first one.
    """
    table = dict(model.named_parameters())
    rest = [name for name in _partition(model, parameters)[1] if is_piece(table[name])]
    if rest:
        raise UnsupportedError(
            f"{rest[0]} is sharded by FSDP and no Linear layer's own weight, so no row's gradient of it can be had; "
            "let only such layers respond: ResponseConfig(parameters='linear'), 'lora' or 'lora_B'"
        )


class PerSampleGradients:
    """Computes gradients of row losses with respect to the responding parameters; use inside [`frozen`].

    Of a sharded model a call is a collective: every rank makes it, with rows of its own.

    Args:
        model (`nn.Module`): in evaluation mode.
        parameters (`Parameters`): what responds.
        objective (`Objective`): the likelihood.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, objective: Objective):
        if any(module.training for module in model.modules()):
            raise UnsupportedError(
                "the model is in training mode, where dropout makes every gradient a different one; call model.eval()"
            )
        refuse_batch_statistics(model)
        refuse_silent_backward(model)
        refuse_sharded_rest(model, parameters)
        self.model, self.parameters, self.objective = model, parameters, objective
        self._sharded = is_sharded(model)
        self._hooked, self._others = _partition(model, parameters)
        self._checked, self._vmaps, self._dtypes = False, True, set[torch.dtype]()

    def __call__(self, batch: Batch, uniforms: Tensor | None = None, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Gradients of a batch.

        Args:
            batch (`Mapping`): tensors whose first dimension is the rows; `labels` among them.
            uniforms (`Tensor`, *optional*): (rows, positions) in [0, 1). With it the gradient is not of the data's
                labels but of labels sampled from the model (for the Gauss-Newton matrix).
            smoothing (`float`): of the labels, as in `row_losses`.

        Returns:
            gradients (rows, P) and the number of supervised positions of each row (rows,).

        Raises:
            NumericalError: a gradient is not finite.
            UnsupportedError: the gradients of rows cannot be told apart in this model.
        """
        gradients, labels, certain = self._compute(batch, uniforms, smoothing)
        # A sum shows it without a table of all answers; one that overflows is looked at twice.
        if not bool(torch.isfinite(gradients.sum())) and not bool(torch.isfinite(gradients).all()):
            bad = (~torch.isfinite(gradients).all(1)).nonzero().flatten().tolist()
            raise NumericalError(f"the gradient of row(s) {bad} of a batch is not finite: the loss is NaN or infinite")
        if self._sharded and not certain:  # a check now and then would leave other ranks waiting
            raise UnsupportedError(
                f"{type(self.model).__name__} flattens rows and positions into one dimension, and is sharded by FSDP; "
                "finish the bank in one process: build_bank(model, dataset, config, record=...)"
            )
        if not (self._checked and certain):
            self._check(batch, labels, gradients, smoothing)
            self._checked = True
        return gradients, (labels != IGNORED).sum(1)

    def _compute(self, batch: Batch, uniforms: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor, bool]:
        """Gradients (rows, P), the labels that they are of, and whether every activation said which rows it held."""
        blocks: dict[str, Tensor] = {}
        with torch.enable_grad(), fused_activations(self.model):
            with _Traces(self.model, self._hooked) as traces:
                logits, labels = self.objective.forward(self.model, batch)
                if uniforms is not None:
                    labels = sample_labels(logits, labels, uniforms[:, : labels.shape[1]])
                if traces.calls:
                    blocks |= traces.gradients(row_losses(logits, labels, smoothing).sum(), *labels.shape)
            for name in self._hooked:
                if name not in blocks:  # the module was never called: this batch does not depend on it
                    shape = self.parameters.shapes[self.parameters.live.index(name)]
                    blocks[name] = logits.new_zeros(labels.shape[0], *shape)
            if self._others:
                with sdpa_kernel(SDPBackend.MATH):  # which vmap can follow
                    blocks |= self._by_row(batch, labels.detach(), smoothing)
        self._dtypes |= {logits.dtype, *traces.dtypes}
        gradients = self.parameters.join({name: _wide(block) for name, block in blocks.items()}).detach()
        return gradients, labels.detach(), traces.certain

    def _by_row(self, batch: Batch, labels: Tensor, smoothing: float) -> dict[str, Tensor]:
        """Gradients of the weights that hooks cannot serve: under vmap, or row after row where vmap cannot follow."""
        table = dict(self.model.named_parameters())
        weights = {name: table[name].detach() for name in self._others}
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
        likelihood = Likelihood(self.model, self.objective)

        def loss(weights: dict[str, Tensor], row: dict[str, Tensor], label: Tensor) -> Tensor:
            single: dict[str, Any] = {key: value.unsqueeze(0) for key, value in row.items()} | fixed
            logits, _ = likelihood.at(weights, single)
            return row_losses(logits, label.unsqueeze(0), smoothing).sum()

        if self._vmaps:
            try:
                return vmap(grad(loss), in_dims=(None, 0, 0))(weights, tensors, labels)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # for one, transformers looks into a padding mask, which vmap forbids
                self._vmaps = False
        rows = [
            grad(loss)(weights, {key: value[row] for key, value in tensors.items()}, labels[row])
            for row in range(len(labels))
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in self._others}

    def _check(self, batch: Batch, labels: Tensor, gradients: Tensor, smoothing: float) -> None:
        """Compare the batch's largest gradient with plain autograd on its row alone, with the same labels.

        In half precision a gradient changes by a fifth with the shape of the batch alone (kernels round in another
        order, layer upon layer), so there the row is alone in a batch of its own copies, of the same shape.
        """
        row = int(gradients.norm(dim=1).argmax())
        half = any(dtype.itemsize < 4 for dtype in self._dtypes)
        copies = torch.full((len(labels),) if half else (1,), row, device=labels.device)
        single = {key: value[copies] if isinstance(value, Tensor) else value for key, value in batch.items()}
        live = self.parameters.tensors(self.model)
        used: list[Tensor] = list(live)
        with torch.enable_grad(), trainable(live), self._as_used(used):
            logits, _ = self.objective.forward(self.model, single)
            loss = row_losses(logits, labels[copies], smoothing).mean()
            plain = torch.autograd.grad(loss, used, allow_unused=True)
        alone = torch.cat(
            [
                (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
                for parameter, gradient in zip(used, plain, strict=True)
            ]
        )
        scale = max(float(alone.norm()), float(gradients[row].norm()))
        difference = float((_wide(alone) - gradients[row]).norm()) / max(scale, 1e-12)
        # Float32 adapters on a base in half precision have gradients with its digits; so have weights under autocast.
        tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in {alone.dtype, *self._dtypes})
        if difference > tolerance and scale > 1e-9:
            raise UnsupportedError(
                f"in {type(self.model).__name__} a row's gradient inside a batch differs from its gradient alone by "
                f"{difference:.1%}: rows touch each other (batch norm, routing with capacity, a custom layer that "
                "uses its weight elsewhere). Choose other responding parameters, or batch_size=1"
            )

    @contextmanager
    def _as_used(self, used: list[Tensor]) -> Iterator[None]:
        """While the model runs, replace sharded weights in a list like `parameters.tensors` by what computes: a whole
        weight that FSDP puts in their place.
        """
        handles = []
        for index, name in enumerate(self.parameters.live if self._sharded else ()):
            module_path, _, leaf = name.rpartition(".")

            def see(module: nn.Module, _: Any, index: int = index, leaf: str = leaf) -> None:
                used[index] = getattr(module, leaf)

            handles.append(self.model.get_submodule(module_path).register_forward_pre_hook(see))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Traces:
    """Inputs and outputs of the hooked Linears during one forward pass."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        owners = {name.rpartition(".")[0] for name in names}
        self.names = names
        self.modules = {module_path: model.get_submodule(module_path) for module_path in owners}
        self.calls: list[tuple[str, Tensor, GradientEdge]] = []
        self.certain, self.dtypes = True, set[torch.dtype]()

    def __enter__(self) -> "_Traces":
        self._handles = [
            module.register_forward_hook(self._record(module_path)) for module_path, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, module_path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # With nothing trainable, the graph begins at the lowest responding output and not below it. The model goes
            # on with a copy, which it may change in place; of the original only its edge in the graph is kept.
            source = output if output.requires_grad else output.detach().requires_grad_(True)
            self.dtypes |= {inputs[0].dtype, output.dtype}
            self.calls.append((module_path, inputs[0].detach(), get_gradient_edge(source)))
            return source.clone()

        return hook

    def gradients(self, loss: Tensor, rows: int, positions: int) -> dict[str, Tensor]:
        """Live name -> (rows, *shape): the sum over a module's calls of input times incoming gradient."""
        incoming: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, [edge for _, _, edge in self.calls], allow_unused=True
        )
        result: dict[str, Tensor] = {}
        for (module_path, x, _), g in zip(self.calls, incoming, strict=True):
            if g is None:
                continue
            self.certain &= x.ndim > 2 or (x.shape[0] == rows and positions == 1)
            x, g = _rows_first(x, rows, module_path), _rows_first(g, rows, module_path)
            for name in self.names:
                if name.rpartition(".")[0] == module_path:
                    block = _linear_gradient(self.modules[module_path], name, x, g)
                    result[name] = result[name] + block if name in result else block
        return result


def _linear_gradient(module: nn.Module, name: str, x: Tensor, g: Tensor) -> Tensor:
    """(rows, *shape) of a Linear's or Conv1D's weight or bias; x (rows, positions, in), g (rows, positions, out)."""
    if name.endswith("bias"):
        return g.sum(1)
    return g.transpose(1, 2) @ x if isinstance(module, nn.Linear) else x.transpose(1, 2) @ g


def _rows_first(tensor: Tensor, rows: int, module_path: str) -> Tensor:
    """(rows, positions, features) of an activation, in float32 or better."""
    if tensor.ndim == 2 and tensor.shape[0] != rows and tensor.shape[0] % rows == 0:
        tensor = tensor.unflatten(0, (rows, -1))  # some models flatten (rows, positions) into one dimension
    if tensor.shape[0] != rows:
        raise UnsupportedError(
            f"{module_path} saw an activation of shape {tuple(tensor.shape)} for a batch of {rows} rows: "
            "its rows cannot be told apart, so it cannot respond"
        )
    return _wide(tensor).reshape(rows, -1, tensor.shape[-1])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _partition(model: nn.Module, parameters: Parameters) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Live names served by hooks, and those left to vmap (norms, embeddings, weights used in two places)."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    hooked: list[str] = []
    others: list[str] = []
    for name in parameters.live:
        module_path = model.get_submodule(name.rpartition(".")[0])
        shared = uses[id(model.get_parameter(name))] > 1
        (hooked if is_linear(module_path) and not shared else others).append(name)
    return tuple(hooked), tuple(others)
