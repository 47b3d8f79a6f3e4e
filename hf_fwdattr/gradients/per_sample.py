"""Per-sample gradients: those of every row's loss, (rows, P), in one backward pass per batch.

A Linear's gradient is the product of its input and the gradient by its output, so hooks give each row's gradient; LoRA
matrices are Linears, whatever the architecture around them. Other weights are differentiated by `vmap` over rows. The
first batch is checked against plain autograd on one row alone: a model in which rows influence each other is refused.
Where a Linear has rows and positions in one dimension, every batch is checked, as their order may change unnoticed.
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
from ..layers.linear import linear_gradient
from ..models.compat import fused_activations, refuse_silent_backward
from ..models.fsdp import is_shard, is_sharded
from ..models.likelihood import IGNORED, Batch, Likelihood, Objective, row_losses, sample_labels
from ..models.modes import refuse_batch_statistics, trainable
from ..models.parameters import TrackedParameters, is_linear


__all__ = ["PerSampleGradients", "refuse_unhooked_shards"]

# Largest difference between hooks and plain autograd on one row, relative to its gradient, by the layers' dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


def refuse_unhooked_shards(model: nn.Module, parameters: TrackedParameters) -> None:
    """Refuse tracked parameters that are sharded and do not belong to a Linear layer alone.

    Raises:
        UnsupportedError: the message names one.
    """
    table = dict(model.named_parameters())
    unhooked = [name for name in _split_by_method(model, parameters)[1] if is_shard(table[name])]
    if unhooked:
        raise UnsupportedError(
            f"{unhooked[0]} is sharded by FSDP and not the weight of one Linear layer, so that rows have no gradient "
            "of their own. Track Linear layers only: ResponseConfig(parameters='linear'), 'lora' or 'lora_B'"
        )


class PerSampleGradients:
    """Computes gradients of row losses by the tracked parameters; use it inside `frozen`.

    With a sharded model a call is a collective: every rank makes it, with its own rows.

    Args:
        model (`nn.Module`): in evaluation mode.
        parameters (`TrackedParameters`): the tracked parameters.
        objective (`Objective`): the likelihood.
    """

    def __init__(self, model: nn.Module, parameters: TrackedParameters, objective: Objective):
        if any(module.training for module in model.modules()):
            raise UnsupportedError(
                "the model is in training mode, where dropout makes gradients random; call model.eval()"
            )
        refuse_batch_statistics(model)
        refuse_silent_backward(model)
        refuse_unhooked_shards(model, parameters)
        self.model, self.parameters, self.objective = model, parameters, objective
        self._sharded = is_sharded(model)
        self._hooked, self._others = _split_by_method(model, parameters)
        self._is_checked, self._uses_vmap, self._dtypes = False, True, set[torch.dtype]()

    def __call__(self, batch: Batch, uniforms: Tensor | None = None, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch.

        Args:
            batch (`Mapping`): tensors whose first dimension is the rows; `labels` among them.
            uniforms (`Tensor`, *optional*): (rows, positions) in [0, 1). With them, labels are sampled from the model
                (for the Gauss-Newton matrix) instead of taken from the batch.
            smoothing (`float`): label smoothing, as in `row_losses`.

        Returns:
            Gradients (rows, P), and the number of supervised positions of each row (rows,).

        Raises:
            NumericalError: a gradient is not finite.
            UnsupportedError: rows have no gradients of their own in this model.
        """
        gradients, labels, rows_are_separate = self._compute(batch, uniforms, smoothing)
        # The sum shows it without a mask of all entries; where the sum overflows, the entries are examined.
        if not bool(torch.isfinite(gradients.sum())) and not bool(torch.isfinite(gradients).all()):
            bad = (~torch.isfinite(gradients).all(1)).nonzero().flatten().tolist()
            raise NumericalError(f"the gradient of row(s) {bad} of a batch is not finite: the loss is NaN or infinite")
        if self._sharded and not rows_are_separate:  # a check on one rank would leave the others waiting
            raise UnsupportedError(
                f"{type(self.model).__name__} flattens rows and positions into one dimension and is sharded by FSDP. "
                "Their order cannot be checked in every batch. "
                "Finish the bank in one process: build_bank(model, dataset, config, record=...)"
            )
        if not (self._is_checked and rows_are_separate):
            self._check(batch, labels, gradients, smoothing)
            self._is_checked = True
        return gradients, (labels != IGNORED).sum(1)

    @property
    def is_half(self) -> bool:
        """True after calls in half precision, where gradients change with the shape of the batch."""
        return any(dtype.itemsize < 4 for dtype in self._dtypes)

    def _compute(self, batch: Batch, uniforms: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor, bool]:
        """Compute gradients (rows, P), their labels, and whether all activations keep rows in a dimension."""
        blocks: dict[str, Tensor] = {}
        with torch.enable_grad(), fused_activations(self.model):
            with _LinearCalls(self.model, self._hooked) as linears:
                logits, labels = self.objective.forward(self.model, batch)
                if uniforms is not None:
                    labels = sample_labels(logits, labels, uniforms[:, : labels.shape[1]])
                if linears.calls:
                    try:
                        blocks |= linears.gradients(row_losses(logits, labels, smoothing).sum(), *labels.shape)
                    except _NoRows as error:
                        if self._sharded:
                            raise
                        self._differentiate_by_row(error.path)
                        return self._compute(batch, uniforms, smoothing)
            for name in self._hooked:
                if name not in blocks:  # its module was not called, so the loss does not depend on it
                    shape = self.parameters.shapes[self.parameters.live.index(name)]
                    blocks[name] = logits.new_zeros(labels.shape[0], *shape)
            if self._others:
                with sdpa_kernel(SDPBackend.MATH):  # vmap supports no other kernel
                    blocks |= self._by_row(batch, labels.detach(), smoothing)
        self._dtypes |= {logits.dtype, *linears.dtypes}
        gradients = self.parameters.join({name: _wide(block) for name, block in blocks.items()}).detach()
        return gradients, labels.detach(), linears.rows_are_separate

    def _differentiate_by_row(self, path: str) -> None:
        """Give up hooks on a layer that all rows share a call of, as the encoder of a prompt (p-tuning)."""
        moved = tuple(name for name in self._hooked if name.rpartition(".")[0] == path)
        self._hooked = tuple(name for name in self._hooked if name not in moved)
        self._others += moved

    def _by_row(self, batch: Batch, labels: Tensor, smoothing: float) -> dict[str, Tensor]:
        """Differentiate weights without hooks, by vmap over rows, or row after row where vmap is not supported."""
        table = dict(self.model.named_parameters())
        weights = {name: table[name].detach() for name in self._others}
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
        likelihood = Likelihood(self.model, self.objective)

        def loss(weights: dict[str, Tensor], row: dict[str, Tensor], label: Tensor) -> Tensor:
            single: dict[str, Any] = {key: value.unsqueeze(0) for key, value in row.items()} | fixed
            logits, _ = likelihood.at(weights, single)
            return row_losses(logits, label.unsqueeze(0), smoothing).sum()

        if self._uses_vmap:
            try:
                return vmap(grad(loss), in_dims=(None, 0, 0))(weights, tensors, labels)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # transformers, for one, branches on the values of a padding mask
                self._uses_vmap = False
        rows = [
            grad(loss)(weights, {key: value[row] for key, value in tensors.items()}, labels[row])
            for row in range(len(labels))
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in self._others}

    def _check(self, batch: Batch, labels: Tensor, gradients: Tensor, smoothing: float) -> None:
        """Compare the largest gradient of a batch with plain autograd on its row alone, with the same labels.

        In half precision a gradient changes by up to a fifth with the shape of the batch alone, as kernels round in
        another order. There the row is compared in a batch of its own copies, of the same shape.

        Raises:
            UnsupportedError: they differ by more than rounding.
        """
        row = int(gradients.norm(dim=1).argmax())
        copies = torch.full((len(labels),) if self.is_half else (1,), row, device=labels.device)
        single = {key: value[copies] if isinstance(value, Tensor) else value for key, value in batch.items()}
        live = self.parameters.tensors(self.model)
        used: list[Tensor] = list(live)
        with torch.enable_grad(), trainable(live), self._gathered_weights(used):
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
                f"{difference:.1%}: rows influence each other (batch norm, routing with capacity, a custom layer that "
                "uses its weight elsewhere). Track other parameters, or use batch_size=1"
            )

    @contextmanager
    def _gathered_weights(self, used: list[Tensor]) -> Iterator[None]:
        """Replace shards in `used`, the tracked parameters, by the full weights that FSDP puts in their place."""
        handles = []
        for index, name in enumerate(self.parameters.live if self._sharded else ()):
            module_path, _, leaf = name.rpartition(".")

            def replace(module: nn.Module, _: Any, index: int = index, leaf: str = leaf) -> None:
                used[index] = getattr(module, leaf)

            handles.append(self.model.get_submodule(module_path).register_forward_pre_hook(replace))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _NoRows(UnsupportedError):
    """A layer's activation has no dimension for the rows."""

    def __init__(self, message: str, path: str):
        super().__init__(message)
        self.path = path


class _LinearCalls:
    """Calls of the hooked Linears in one forward pass: inputs, and outputs in the graph.

    Attributes:
        rows_are_separate (`bool`): whether the first dimension of all their inputs is the rows; set by `gradients`.
        dtypes (`set`): dtypes of inputs and outputs.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        self.names = names
        self.modules = {path: model.get_submodule(path) for path in {name.rpartition(".")[0] for name in names}}
        self.calls: list[tuple[str, Tensor, GradientEdge]] = []
        self.rows_are_separate, self.dtypes = True, set[torch.dtype]()

    def __enter__(self) -> "_LinearCalls":
        self._handles = [module.register_forward_hook(self._hook(path)) for path, module in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # With nothing trainable, the graph begins at the first of these outputs. The model goes on with a copy,
            # which it may change in place; of the original only its edge in the graph is kept.
            source = output if output.requires_grad else output.detach().requires_grad_(True)
            self.dtypes |= {inputs[0].dtype, output.dtype}
            self.calls.append((path, inputs[0].detach(), get_gradient_edge(source)))
            return source.clone()

        return hook

    def gradients(self, loss: Tensor, rows: int, positions: int) -> dict[str, Tensor]:
        """Return gradients (rows, *shape) by live name, summed over all calls of a module."""
        edges = [edge for _, _, edge in self.calls]
        by_outputs: tuple[Tensor | None, ...] = torch.autograd.grad(loss, edges, allow_unused=True)
        result: dict[str, Tensor] = {}
        for (path, x, _), gradient in zip(self.calls, by_outputs, strict=True):
            if gradient is None:
                continue
            self.rows_are_separate &= x.ndim > 2 or (x.shape[0] == rows and positions == 1)
            x, gradient = _rows_first(x, rows, path), _rows_first(gradient, rows, path)
            for name in self.names:
                if name.rpartition(".")[0] == path:
                    block = linear_gradient(self.modules[path], name, x, gradient)
                    result[name] = result[name] + block if name in result else block
        return result


def _rows_first(tensor: Tensor, rows: int, path: str) -> Tensor:
    """Reshape an activation to (rows, positions, features), float32 or float64."""
    if tensor.ndim == 2 and tensor.shape[0] != rows and tensor.shape[0] % rows == 0:
        tensor = tensor.unflatten(0, (rows, -1))  # some models flatten (rows, positions) into one dimension
    if tensor.shape[0] != rows:
        raise _NoRows(
            f"{path} has an activation of shape {tuple(tensor.shape)} in a batch of {rows} rows. None of its "
            "dimensions is the rows, so that rows have no gradient of their own. Track other parameters",
            path,
        )
    return _wide(tensor).reshape(rows, -1, tensor.shape[-1])


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _split_by_method(model: nn.Module, parameters: TrackedParameters) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return live names differentiated by hooks, and by vmap (norms, embeddings, weights used in two places)."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    hooked: list[str] = []
    others: list[str] = []
    for name in parameters.live:
        module = model.get_submodule(name.rpartition(".")[0])
        shared = uses[id(model.get_parameter(name))] > 1
        (hooked if is_linear(module) and not shared else others).append(name)
    return tuple(hooked), tuple(others)
