"""Capture: per-row gradients from the very backward pass that trains.

A Linear's gradient is the product of its input and of the gradient by its output. Hooks see both while the model
trains, so that a row's gradient costs one small product more. What the loop multiplied its loss with is part of it,
and so are dropout and noise: it is the push that the row really gave.

Nothing is changed in the graph: hooks return nothing, and outputs are not copied.
"""

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..layers.linear import linear_gradient
from ..models.fsdp import is_shard
from ..models.parameters import TrackedParameters
from .linear_calls import wide
from .per_sample import split_by_method


__all__ = ["CapturedBatch", "GradientCapture", "unhooked_weights"]

# Largest difference between the sum over rows and the gradient of a weight, relative to it, by the weights' dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def unhooked_weights(model: nn.Module, parameters: TrackedParameters) -> list[str]:
    """Return names of tracked parameters that are not the weight or bias of one Linear layer alone."""
    return list(split_by_method(model, parameters)[1])


@dataclass
class CapturedBatch:
    """The gradients of a micro-batch's rows, filled while its backward pass runs.

    Attributes:
        rows (`int`): n.
        gradients (`Tensor`, *optional*): (n, P) of the training loss, float32 (float64 for float64 models); None until
            the first of them arrives.
        totals (`dict[str, Tensor]`, *optional*): gradients of the weights, by live name, as autograd summed them; kept
            where they are compared; empty for sharded weights, whose whole gradient no rank has.
    """

    rows: int
    gradients: Tensor | None = None
    totals: dict[str, Tensor] | None = None


@dataclass
class _Call:
    """A call of a module whose output gets its gradient later."""

    path: str
    batch: CapturedBatch
    x: Tensor | None
    gradient: Tensor | None = field(default=None)


class GradientCapture:
    """Hooks on the tracked Linears of a model that trains.

    Args:
        model (`nn.Module`): without the wrappers that Accelerate put around it.
        parameters (`TrackedParameters`): the tracked parameters, all of them weights or biases of Linears.

    Attributes:
        handles (`list`): of the hooks.
        failure (`str`): why gradients of rows cannot be captured; empty while they can.
    """

    def __init__(self, model: nn.Module, parameters: TrackedParameters):
        self._model, self._parameters = model, parameters
        self._paths: dict[str, list[str]] = {}
        for name in parameters.live:
            self._paths.setdefault(name.rpartition(".")[0], []).append(name)
        self._modules = {path: model.get_submodule(path) for path in self._paths}
        ends = accumulate(parameters.sizes, initial=0)
        self._columns = {name: slice(*pair) for name, pair in zip(parameters.live, pairwise(ends), strict=True)}
        self._weights = dict(zip(parameters.live, parameters.tensors(model), strict=True))
        self._batch: CapturedBatch | None = None
        self._open, self._several = False, False  # several forward passes before a backward pass
        self._waiting: dict[str, list[_Call]] = {}  # of a checkpointed layer, until it runs again
        self._rerun: set[str] = set()  # modules that run again at this moment
        self.failure = ""
        self.handles: list[Any] = [
            module.register_forward_hook(self._hook(path)) for path, module in self._modules.items()
        ]
        self.handles += [
            module.register_forward_pre_hook(self._rerun_hook(path)) for path, module in self._modules.items()
        ]
        if not any(is_shard(weight) for weight in self._weights.values()):  # those in the graph are others there
            self.handles += [
                weight.register_hook(self._total(name))
                for name, weight in self._weights.items()
                if weight.requires_grad
            ]

    def begin(self, rows: int, compared: bool) -> CapturedBatch:
        """Capture from the forward pass that begins; `compared` keeps what `refuse_other_totals` needs."""
        if any(self._waiting.values()) or self._is_unread:
            self._several = True
        self._waiting.clear()
        self._rerun.clear()
        self._batch, self._open = CapturedBatch(rows, totals={} if compared else None), True
        return self._batch

    @property
    def _is_unread(self) -> bool:
        """Return whether the last batch has had no backward pass yet."""
        return self._batch is not None and self._batch.gradients is None

    def end(self) -> None:
        """Note that the forward pass is over; its backward pass goes on filling its batch."""
        self._open = False

    def give_up(self, reason: str) -> None:
        """Capture no more."""
        self.failure = self.failure or reason
        self._batch, self._open = None, False
        self._waiting.clear()
        for handle in self.handles:
            handle.remove()

    def refuse_other_totals(self, batches: list[CapturedBatch]) -> None:
        """Compare the sums over rows with the gradients of the weights, where those were kept.

        Raises:
            UnsupportedError: they differ: a weight is used otherwise than by calls of its layer.
        """
        for batch in batches:
            if not batch.totals or batch.gradients is None:
                continue
            sums = batch.gradients.sum(0)
            scale = max(sum(float(total.norm()) ** 2 for total in batch.totals.values()) ** 0.5, 1e-30)
            for name, total in batch.totals.items():
                whole = wide(total).reshape(-1).to(sums.device)
                error = float((whole - sums[self._columns[name]]).norm()) / scale
                if error > _TOLERANCE.get(total.dtype, 5e-2):
                    raise UnsupportedError(
                        f"{name}: the gradients of its rows differ from their sum in training by {error:.1%} of the "
                        "whole gradient, so the weight is used otherwise than by calls of its layer"
                    )

    def _total(self, name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            batch = self._batch
            if batch is not None and batch.totals is not None:
                held = batch.totals.get(name)
                batch.totals[name] = gradient.detach().clone() if held is None else held + gradient.detach()

        return hook

    def _hook(self, path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            batch, in_backward = self._batch, _is_in_backward()
            if batch is None or not (self._open or in_backward) or not inputs or not output.requires_grad:
                return
            if in_backward and path in self._rerun:
                self._rerun.discard(path)
                return
            if in_backward and not self._is_single():
                return
            call = _Call(path, batch, inputs[0].detach())
            if not in_backward and self._is_checkpointed(path):
                call.x = None  # it would be kept in memory, which checkpoints are there to save
                self._waiting.setdefault(path, []).append(call)
            output.register_hook(self._arrival(call))

        return hook

    def _rerun_hook(self, path: str) -> Any:
        """Return a hook for a checkpointed layer that runs again, which may stop before its last output."""

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and self._waiting.get(path) and _is_in_backward() and self._is_single():
                call = self._waiting[path].pop(0)
                call.x = inputs[0].detach()
                self._rerun.add(path)
                self._add(call)

        return hook

    def _is_single(self) -> bool:
        """Return whether it is known which batch a layer runs again for; give up where it is not."""
        if self._several:
            self.give_up("layers with gradient checkpoints ran several times before a backward pass")
        return not self._several

    def _arrival(self, call: _Call) -> Any:
        def hook(gradient: Tensor) -> None:
            call.gradient = gradient.detach()
            self._add(call)

        return hook

    def _add(self, call: _Call) -> None:
        """Add the rows' gradients of one call, once input and gradient are there."""
        if call.x is None or call.gradient is None or self.failure:
            return
        x, gradient, call.x, call.gradient = call.x, call.gradient, None, None
        if len(x) != call.batch.rows or len(gradient) != call.batch.rows:
            self.give_up(
                f"{call.path} has an activation of shape {tuple(x.shape)} in a batch of {call.batch.rows} rows, whose "
                "first dimension is not the rows"
            )
            return
        try:
            self._multiply(call, x, gradient)
        except RuntimeError as error:  # out of memory, for one: it would end the training
            call.batch.gradients = None
            self.give_up(str(error))

    def _multiply(self, call: _Call, x: Tensor, gradient: Tensor) -> None:
        batch, rows = call.batch, call.batch.rows
        x, gradient = (wide(tensor).reshape(rows, -1, tensor.shape[-1]) for tensor in (x, gradient))
        if batch.gradients is None:
            batch.gradients = gradient.new_zeros(rows, self._parameters.size)
        for name in self._paths[call.path]:
            if not self._weights[name].requires_grad:  # frozen on the way: nothing moves it
                continue
            block = linear_gradient(self._modules[call.path], name, x, gradient)
            batch.gradients[:, self._columns[name]] += block.reshape(rows, -1).to(batch.gradients.device)

    def _is_checkpointed(self, path: str) -> bool:
        """Return whether the module runs inside a layer that runs again in the backward pass.

        Checkpoints put hooks on what the graph saves, and so does offloading, which runs nothing again; the flag of
        transformers stands at layers and at whole models.
        """
        hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        if hooks is None or hooks(True) is None:
            return False
        parents = path.split(".")
        return any(
            getattr(self._model.get_submodule(".".join(parents[:depth])), "gradient_checkpointing", False)
            for depth in range(1, len(parents))
        )


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
