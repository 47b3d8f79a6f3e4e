"""MLPs, gated or not: their VJP and JVP."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp

from .activations import ActivationRecorder
from .block import Block


__all__ = ["MLP", "MLPJVP", "elementwise_derivative"]


def elementwise_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Differentiate an elementwise function at every entry of `x`, by forward mode."""
    return jvp(function, (x,), (torch.ones_like(x),))[1]


@dataclass(frozen=True)
class MLP(Block):
    """MLP whose core is activation(gate) * up, or activation(in) with a single input projection."""

    activation: Callable[[Tensor], Tensor]

    def core(self, model: nn.Module, recorder: ActivationRecorder) -> Tensor | None:
        gate, *up = (recorder.outputs[path] for path in self.inputs)
        return self.activation(gate) * up[0] if up else self.activation(gate)

    def core_vjp(self, model: nn.Module, recorder: ActivationRecorder, gradient: Tensor) -> list[Tensor]:
        gate, *up = (recorder.outputs[path][:, : gradient.shape[1]].to(gradient.dtype) for path in self.inputs)
        derivative = elementwise_derivative(self.activation, gate)
        if not up:
            return [gradient * derivative]
        return [gradient * up[0] * derivative, gradient * self.activation(gate)]


class MLPJVP:
    """Tangents of an MLP's core in one recorded pass; products in `dtype`."""

    def __init__(self, block: MLP, recorder: ActivationRecorder, dtype: torch.dtype):
        gate, *up = (recorder.outputs[path] for path in block.inputs)
        factors = [elementwise_derivative(block.activation, gate)]
        if up:
            factors = [factors[0] * up[0], block.activation(gate)]
        self._factors = [factor.to(dtype) for factor in factors]

    def jvp(self, tangents: list[Tensor | None]) -> Tensor | None:
        """Return tangents (k, rows, positions, size) of the core's output; None if nothing moves.

        Args:
            tangents: one (k, rows, positions, out) per input projection, of its output, or None if that does not
                move; they are overwritten.
        """
        result = None
        for tangent, factor in zip(tangents, self._factors, strict=True):
            if tangent is not None:
                result = tangent.mul_(factor) if result is None else result.addcmul_(tangent, factor)
        return result
