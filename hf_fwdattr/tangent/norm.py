"""Tangents through layer norms and RMS norms."""

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..synthetic.adjoint import layer_norm
from ..synthetic.trace import form_of


class Norm:
    """One norm where a batch passes it.

    With u = (x - mean) / s, s the root of the mean square, the tangent is gain / s (dx - mean(dx) - u mean(u dx));
    RMS norms do without the means of x and dx.

    Args:
        x, y (`Tensor`): (..., d) what went into it and what came out.

    Raises:
        UnsupportedError: it computes something else.
    """

    def __init__(self, path: str, module: nn.Module, x: Tensor, y: Tensor):
        form = form_of(module, x, y)
        if form is None:
            raise UnsupportedError(f"{path} is a {type(module).__name__}, which is not written out")
        wide = x.to(form.gain.dtype)
        self._centred = form.pull is layer_norm
        if self._centred:
            wide = wide - wide.mean(-1, keepdim=True)
        inverse = (wide.square().mean(-1, keepdim=True) + form.eps).rsqrt()
        self._unit, self._factor = (wide * inverse).flatten(0, -2), (inverse * form.gain).flatten(0, -2)

    def push(self, moved: Tensor) -> Tensor:
        """Tangents (k, ..., d), in the type they come in."""
        flat = moved.flatten(1, -2)
        unit, factor = self._unit.to(moved.dtype), self._factor.to(moved.dtype)
        along = torch.einsum("knd,nd->kn", flat, unit).unsqueeze(-1)
        result = torch.addcmul(flat, unit, along, value=-1.0 / flat.shape[-1])
        if self._centred:
            result -= flat.mean(-1, keepdim=True)
        return result.mul_(factor).view(moved.shape)
