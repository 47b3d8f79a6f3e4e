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
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import NumericalError, UnsupportedError
from ..models.compat import fused_activations, refuse_silent_backward
from ..models.fsdp import is_shard, is_sharded
from ..models.likelihood import IGNORED, Batch, Likelihood, Objective, row_losses, sample_labels
from ..models.modes import refuse_batch_statistics, trainable
from ..models.parameters import TrackedParameters, is_linear
from .linear_calls import LinearCalls, RowlessActivation, refuse_rowless_tensors, wide


__all__ = ["PerSampleGradients", "refuse_unhooked_shards", "split_by_method"]

# Largest difference between hooks and plain autograd on one row, relative to its gradient, by the layers' dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.1}


def refuse_unhooked_shards(model: nn.Module, parameters: TrackedParameters) -> None:
    """Refuse tracked parameters that are sharded and do not belong to a Linear layer alone.

    Raises:
        UnsupportedError: the message names one.
    """
    table = dict(model.named_parameters())
    unhooked = [name for name in split_by_method(model, parameters)[1] if is_shard(table[name])]
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
        self._hooked, self._others = split_by_method(model, parameters)
        self._rows_lead = True
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
        self._rows_lead &= rows_are_separate
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
    def obstacle(self) -> str:
        """Why a training's backward pass does not show rows' gradients, after calls; empty if it does."""
        if self._others:
            return f"{self._others[0]} is not the weight of one Linear layer alone"
        return "" if self._rows_lead else "some layers have rows and positions in one dimension, in an unknown order"

    @property
    def is_half(self) -> bool:
        """True after calls in half precision, where gradients change with the shape of the batch."""
        return any(dtype.itemsize < 4 for dtype in self._dtypes)

    def _compute(self, batch: Batch, uniforms: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor, bool]:
        """Compute gradients (rows, P), their labels, and whether all activations keep rows in a dimension."""
        blocks: dict[str, Tensor] = {}
        with torch.enable_grad(), fused_activations(self.model):
            with LinearCalls(self.model, self._hooked) as linears:
                logits, labels = self.objective.forward(self.model, batch)
                refuse_rowless_tensors(batch, len(labels))
                if uniforms is not None:
                    labels = sample_labels(logits, labels, uniforms[:, : labels.shape[1]])
                if linears.calls:
                    try:
                        blocks |= linears.gradients(row_losses(logits, labels, smoothing).sum(), *labels.shape)
                    except RowlessActivation as error:
                        if self._sharded:
                            raise
                        self._give_up_hooks([n for n in self._hooked if n.rpartition(".")[0] == error.path])
                        return self._compute(batch, uniforms, smoothing)
            silent = [name for name in self._hooked if name not in blocks]
            if silent and self._move_used(silent, batch, labels):
                return self._compute(batch, uniforms, smoothing)
            for name in self._hooked:
                if name not in blocks:  # its module was not called, so the loss does not depend on it
                    shape = self.parameters.shapes[self.parameters.live.index(name)]
                    blocks[name] = logits.new_zeros(labels.shape[0], *shape)
            if self._others:
                with sdpa_kernel(SDPBackend.MATH):  # vmap supports no other kernel
                    blocks |= self._by_row(batch, labels.detach(), smoothing)
        self._dtypes |= {logits.dtype, *linears.dtypes}
        gradients = self.parameters.join({name: wide(block) for name, block in blocks.items()}).detach()
        return gradients, labels.detach(), linears.rows_are_separate

    def _give_up_hooks(self, names: list[str]) -> None:
        """Differentiate weights row by row, such as those of a prompt's encoder, a call of which all rows share."""
        self._hooked = tuple(name for name in self._hooked if name not in names)
        self._others += tuple(names)

    def _move_used(self, names: list[str], batch: Batch, labels: Tensor) -> bool:
        """Give up hooks on weights that are used without a call of their modules, as LoRA on fused experts is.

        It is tried once, on the first batch; of sharded models never.

        Returns:
            Whether there are any.
        """
        if self._is_checked or self._sharded:
            return False
        table = dict(self.model.named_parameters())
        gradients = self._plain_gradients(batch, labels, [table[name] for name in names])
        used = [name for name, gradient in zip(names, gradients, strict=True) if bool(gradient.any())]
        self._give_up_hooks(used)
        return bool(used)

    def _by_row(self, batch: Batch, labels: Tensor, smoothing: float) -> dict[str, Tensor]:
        """Differentiate weights without hooks, by vmap over rows, or row after row where vmap is not supported.

        A single row is differentiated as it is: its tensors need not be indexed by rows.
        """
        table = dict(self.model.named_parameters())
        weights = {name: table[name].detach() for name in self._others}
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
        likelihood = Likelihood(self.model, self.objective)

        def loss(weights: dict[str, Tensor], row: dict[str, Tensor], label: Tensor) -> Tensor:
            single: dict[str, Any] = {key: value.unsqueeze(0) for key, value in row.items()} | fixed
            logits, _ = likelihood.at(weights, single)
            return row_losses(logits, label.unsqueeze(0), smoothing).sum()

        if self._uses_vmap and len(labels) > 1:
            try:
                return vmap(grad(loss), in_dims=(None, 0, 0))(weights, tensors, labels)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # transformers, for one, branches on the values of a padding mask
                self._uses_vmap = False
        single = [slice(None)] if len(labels) == 1 else [slice(row, row + 1) for row in range(len(labels))]
        live = [table[name] for name in self._others]
        rows = [
            self._plain_gradients(
                {key: value[row] for key, value in tensors.items()} | fixed, labels[row], live, smoothing
            )
            for row in single
        ]
        return {name: torch.stack(blocks) for name, blocks in zip(self._others, zip(*rows, strict=True), strict=True)}

    def _plain_gradients(
        self, batch: Batch, labels: Tensor, weights: list[Any], smoothing: float = 0.0
    ) -> list[Tensor]:
        """Differentiate the summed loss of a batch by autograd; zeros for weights that it does not depend on."""
        with trainable(weights):
            logits, _ = self.objective.forward(self.model, batch)
            loss = row_losses(logits, labels, smoothing).sum()
            if not loss.requires_grad:
                return [torch.zeros_like(weight) for weight in weights]
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]

    def _check(self, batch: Batch, labels: Tensor, gradients: Tensor, smoothing: float) -> None:
        """Compare the largest gradient of a batch with plain autograd on its row alone, with the same labels.

        In half precision a gradient changes by up to a fifth with the shape of the batch alone, as kernels round in
        another order. There the row is compared in a batch of its own copies, of the same shape.

        Raises:
            UnsupportedError: they differ by more than rounding.
        """
        row = int(gradients.norm(dim=1).argmax())
        copies = torch.full((len(labels),) if self.is_half else (1,), row, device=labels.device)
        single: Batch = batch
        if len(labels) > 1:
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
        difference = float((wide(alone) - gradients[row]).norm()) / max(scale, 1e-12)
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


def split_by_method(model: nn.Module, parameters: TrackedParameters) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
