"""Layer norm and RMS norm: their VJP and JVP, after a check that the model's norm computes one of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError


__all__ = ["NormForm", "NormJVP", "identify_norm", "norm_gain", "norm_vjp"]


@dataclass(frozen=True)
class NormForm:
    """The function that a norm computes: gain * u with u = (x - mean) / s; RMS norms do not subtract the mean.

    Attributes:
        centred (`bool`): whether the mean is subtracted.
        gain (`Tensor`): (d,).
        eps (`float`): added to the mean square, whose root is s.
    """

    centred: bool
    gain: Tensor
    eps: float

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Turn a gradient (..., d) by the norm's output into the one by its input `x`."""
        unit, inverse = self.normalize(x)
        scaled = gradient * self.gain.to(gradient.dtype)
        projection = (scaled * unit).mean(-1, keepdim=True)
        if self.centred:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        return inverse * (scaled - unit * projection)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u, (..., d), and 1 / s, (..., 1)."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        inverse = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * inverse, inverse


def identify_norm(module: nn.Module, x: Tensor, y: Tensor) -> NormForm | None:
    """Return the form that makes `y` of `x`; None if there is none.

    Whether it centres follows from its class: values do not show it where the mean of `x` is small.
    """
    gain = norm_gain(module)
    if gain is None:
        return None
    wide = y.dtype if y.dtype == torch.float64 else torch.float32
    gain, bias = gain.to(wide), getattr(module, "bias", None)
    expected = y.to(wide) - (0.0 if bias is None else bias.to(wide))
    tolerance = 1e-3 if y.dtype in (torch.float32, torch.float64) else 3e-2
    # Gemma's gains are offsets from one.
    forms = [NormForm(isinstance(module, nn.LayerNorm), scale, _eps(module)) for scale in (gain, 1.0 + gain)]
    unit, _ = forms[0].normalize(x.to(wide))
    errors = [float((unit * form.gain - expected).norm()) for form in forms]
    best = errors.index(min(errors))
    return forms[best] if errors[best] <= tolerance * float(expected.norm()) else None


def norm_vjp(module: nn.Module, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor | None:
    """Turn a gradient (rows, positions, ..., d) by a norm's output into the one by its input.

    Args:
        x, y (`Tensor`): input and output of the norm, with as many positions as `gradient` or more.

    Returns:
        None if the module computes no norm of a known form.
    """
    x, y = x[:, : gradient.shape[1]], y[:, : gradient.shape[1]]
    form = identify_norm(module, x, y)
    return None if form is None else form.vjp(x.to(gradient.dtype), gradient)


def norm_gain(module: nn.Module) -> Tensor | None:
    """Return the gain of a layer norm or RMS norm; None for other modules."""
    is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    gain = getattr(module, "weight", None)
    return gain.detach() if is_norm and isinstance(gain, Tensor) and gain.ndim == 1 else None


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-6)


class NormJVP:
    """Tangents of one call of a norm: gain / s (dx - mean(dx) - u mean(u dx)), for RMS norms without mean(dx).

    Args:
        x, y (`Tensor`): (..., d) input and output of the norm.

    Raises:
        UnsupportedError: `y` is not a norm of `x` of a known form.
    """

    def __init__(self, path: str, module: nn.Module, x: Tensor, y: Tensor):
        form = identify_norm(module, x, y)
        if form is None:
            raise UnsupportedError(f"{path} is a {type(module).__name__}, for which there is no analytic JVP")
        self._centred = form.centred
        unit, inverse = form.normalize(x.to(form.gain.dtype))
        self._unit, self._factor = unit.flatten(0, -2), (inverse * form.gain).flatten(0, -2)

    def jvp(self, tangents: Tensor) -> Tensor:
        """Turn tangents (k, ..., d) of the input into those of the output, in their dtype."""
        flat = tangents.flatten(1, -2)
        unit, factor = self._unit.to(tangents.dtype), self._factor.to(tangents.dtype)
        projection = (flat * unit).sum(-1, keepdim=True)
        result = torch.addcmul(flat, unit, projection, value=-1.0 / flat.shape[-1])
        if self._centred:
            result -= flat.mean(-1, keepdim=True)
        return result.mul_(factor).view(tangents.shape)
