"""Blocks of a decoder layer, attention or MLP: what their VJPs have in common."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..models.lora import linear_layout
from .activations import ActivationRecorder
from .comparison import nearly_equal
from .linear import linear_vjp


__all__ = ["Block"]


@dataclass(frozen=True)
class Block:
    """Projections from the residual stream, a function of their outputs (the core), and a projection back.

    Attributes:
        path (`str`): path of the module.
        inputs (`tuple[str, ...]`): paths of the projections into the block.
        output (`str`): path of the projection back to the residual stream.
    """

    path: str
    inputs: tuple[str, ...]
    output: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all projections."""
        return (*self.inputs, self.output)

    def core(self, model: nn.Module, recorder: ActivationRecorder) -> Tensor | None:
        """Recompute the core's output, the input of the output projection; None if the core is of an unknown kind."""
        raise NotImplementedError

    def core_vjp(self, model: nn.Module, recorder: ActivationRecorder, gradient: Tensor) -> list[Tensor]:
        """Turn the gradient by the core's output into those by the outputs of the input projections."""
        raise NotImplementedError

    def matches_model(self, model: nn.Module, recorder: ActivationRecorder) -> bool:
        """Return whether the block computes what the model computed, at every position."""
        if linear_layout(model.get_submodule(self.output)) is None:
            return False
        recorded, recomputed = recorder.inputs[self.output], self.core(model, recorder)
        return recomputed is not None and nearly_equal(recomputed.to(recorded.dtype), recorded)

    def vjp(self, model: nn.Module, recorder: ActivationRecorder, gradient: Tensor) -> dict[str, Tensor]:
        """Turn the gradient by the block's output into those by its input projections' outputs, keyed by their paths.

        All are (rows, positions, out), with as many positions as `gradient`.
        """
        inner = linear_vjp(model.get_submodule(self.output), gradient)
        assert inner is not None  # `matches_model` is false for such layers
        return dict(zip(self.inputs, self.core_vjp(model, recorder, inner), strict=True))
