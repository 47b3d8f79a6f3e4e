"""Derivatives of single building blocks, written out: what an error at a block's end means at its beginning.

Each is local to one block and needs only what a forward pass computed; no graph is built and nothing is chained
through the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError


def layer_norm(x: Tensor, gain: Tensor, error: Tensor, eps: float) -> Tensor:
    """Error before a layer norm, (..., d), from the one behind it; `x` is the norm's input."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, pull = centred * scale, error * gain
    return scale * (pull - pull.mean(-1, keepdim=True) - unit * (pull * unit).mean(-1, keepdim=True))


def rms_norm(x: Tensor, gain: Tensor, error: Tensor, eps: float) -> Tensor:
    """The same for a norm that does not centre."""
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, pull = x * scale, error * gain
    return scale * (pull - unit * (pull * unit).mean(-1, keepdim=True))


@dataclass(frozen=True)
class Form:
    """How a norm was computed.

    Attributes:
        pull (`Callable`): `layer_norm` or `rms_norm`, of `adjoint`.
        gain (`Tensor`): (d,) what it multiplies with.
        eps (`float`): what it adds to the mean square.
    """

    pull: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    gain: Tensor
    eps: float


def identify_norm(module: nn.Module, x: Tensor, y: Tensor) -> Form | None:
    """The form that makes `y` of `x`; None if the norm is another one, or none at all.

    Whether it centres is told by its class: where the mean of `x` is small, values do not tell.
    """
    gain, eps = norm_gain(module), _eps(module)
    if gain is None:
        return None
    form = layer_norm if isinstance(module, nn.LayerNorm) else rms_norm
    wide = y.dtype if y.dtype == torch.float64 else torch.float32
    x, gain, bias = x.to(wide), gain.to(wide), getattr(module, "bias", None)
    expected = y.to(wide) - (0.0 if bias is None else bias.to(wide))
    tolerance = 1e-3 if y.dtype in (torch.float32, torch.float64) else 3e-2
    centred = x - x.mean(-1, keepdim=True) if form is layer_norm else x
    unit = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    scales = gain, 1.0 + gain  # Gemma's gains are offsets from one
    errors = [float((unit * scale - expected).norm()) for scale in scales]
    best = errors.index(min(errors))
    return Form(form, scales[best], eps) if errors[best] <= tolerance * float(expected.norm()) else None


def norm_vjp(module: nn.Module, x: Tensor, y: Tensor, error: Tensor) -> Tensor | None:
    """The error (rows, positions, ..., d) before a norm, from the one behind it; None if the norm is another one.

    Args:
        x, y: what went into the norm and what came out of it; may have more positions than `error`.
    """
    x, y = x[:, : error.shape[1]], y[:, : error.shape[1]]
    form = identify_norm(module, x, y)
    return None if form is None else form.pull(x.to(error.dtype), form.gain.to(error.dtype), error, form.eps)


def norm_gain(module: nn.Module) -> Tensor | None:
    """The gain of a layer norm or RMS norm."""
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    gain = getattr(module, "weight", None)
    return gain.detach() if named and isinstance(gain, Tensor) and gain.ndim == 1 else None


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-6)


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
        form = identify_norm(module, x, y)
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
