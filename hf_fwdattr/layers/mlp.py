"""Derivatives of single building blocks, written out: what an error at a block's end means at its beginning.

Each is local to one block and needs only what a forward pass computed; no graph is built and nothing is chained
through the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp

from .activations import ActivationRecorder
from .block import Block


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function, by forward mode."""
    return jvp(function, (x,), (torch.ones_like(x),))[1]


@dataclass(frozen=True)
class MLP(Block):
    """act(gate) * up, or act(in)."""

    activation: Callable[[Tensor], Tensor]

    def inner(self, model: nn.Module, trace: ActivationRecorder) -> Tensor | None:
        opened = self.activation(trace.outputs[self.inputs[0]])
        return opened if len(self.inputs) == 1 else opened * trace.outputs[self.inputs[1]]

    def pull(self, model: nn.Module, trace: ActivationRecorder, error: Tensor) -> list[Tensor]:
        outputs = [trace.outputs[path][:, : error.shape[1]].to(error.dtype) for path in self.inputs]
        opening = slope(self.activation, outputs[0])
        if len(outputs) == 1:
            return [error * opening]
        return [error * outputs[1] * opening, error * self.activation(outputs[0])]


class MLPJVP:
    """An MLP where a batch passes it: act(gate) * up, or act(in)."""

    def __init__(self, block: MLP, seen: ActivationRecorder, dtype: torch.dtype):
        gate, *up = (seen.outputs[path] for path in block.inputs)
        slopes = [slope(block.activation, gate)]
        if up:
            slopes = [slopes[0] * up[0], block.activation(gate)]
        self._slopes = [factor.to(dtype) for factor in slopes]

    def push(self, moved: list[Tensor | None]) -> Tensor | None:
        """Tangents (k, rows, positions, size) before the output projection, from those behind the input projections.

        Tangents that are handed over are overwritten.
        """
        result = None
        for part, factor in zip(moved, self._slopes, strict=True):
            if part is not None:
                result = part.mul_(factor) if result is None else result.addcmul_(part, factor)
        return result
