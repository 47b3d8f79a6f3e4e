"""How far what is written out may be from what a model computed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.lora import linear_vjp
from .activations import ActivationRecorder


_FULL, _HALF = 1e-3, 3e-2  # relative, at each position; in half precision


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors (..., d) are equal up to rounding wherever one looks."""
    if one.shape != other.shape:
        return False
    full = all(part.dtype in (torch.float32, torch.float64) for part in (one, other))
    return bool(((one - other).norm(dim=-1) <= (_FULL if full else _HALF) * other.norm(dim=-1)).all())


@dataclass(frozen=True)
class Block:
    """A block whose inputs' errors follow from the error at its end.

    Attributes:
        path (`str`): of the module.
        inputs (`tuple[str, ...]`): paths of the projections into the block.
        output (`str`): path of the projection back to the residual stream.
    """

    path: str
    inputs: tuple[str, ...]
    output: str

    def inner(self, model: nn.Module, trace: ActivationRecorder) -> Tensor | None:
        """What goes into the output projection, written out; None where that cannot be said."""
        raise NotImplementedError

    def pull(self, model: nn.Module, trace: ActivationRecorder, error: Tensor) -> list[Tensor]:
        """Errors at the outputs of `inputs`, from the error before the output projection."""
        raise NotImplementedError

    def holds(self, model: nn.Module, trace: ActivationRecorder) -> bool:
        """Whether the block, written out, is what the model computed, at every position."""
        seen = trace.inputs[self.output]
        layer: Any = model.get_submodule(self.output)
        base = getattr(layer, "base_layer", layer)
        width = base.weight.shape[0] if isinstance(base, nn.Linear) else getattr(base, "nf", 1)
        if linear_vjp(layer, seen.new_zeros(1, width)) is None:
            return False
        inner = self.inner(model, trace)
        return inner is not None and same(inner.to(seen.dtype), seen)

    def errors(self, model: nn.Module, trace: ActivationRecorder, error: Tensor) -> dict[str, Tensor]:
        """Path of each input -> error (rows, positions, out) at its output, from the error at the block's end."""
        inner = linear_vjp(model.get_submodule(self.output), error)
        assert inner is not None  # or `holds` had been false
        return dict(zip(self.inputs, self.pull(model, trace, inner), strict=True))
