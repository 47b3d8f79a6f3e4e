"""Derivatives of single building blocks, written out: what an error at a block's end means at its beginning.

Each is local to one block and needs only what a forward pass computed; no graph is built and nothing is chained
through the layers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp


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


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (rows, heads, positions, size); with -sin it turns back, which is also its transpose."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """(rows, heads, positions, positions) of a softmax attention; causal where no mask is given.

    Args:
        mask (`Tensor`, *optional*): to be added, or booleans that are true where a position may look.
    """
    wide = query if query.dtype == torch.float64 else query.float()  # half precision would show in every weight
    logits = wide @ key.to(wide.dtype).transpose(-1, -2) * scaling
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask.dtype == torch.bool:
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # padding behind a window sees nothing at all
        return weights.to(query.dtype)
    return (logits + mask).softmax(-1).to(query.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float, error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors at query, key and value, from the error (rows, heads, positions, size) at the attention's output."""
    at_value = weights.transpose(-1, -2) @ error
    at_weights = error @ value.transpose(-1, -2)
    at_logits = weights * (at_weights - (at_weights * weights).sum(-1, keepdim=True)) * scaling
    return at_logits @ key, at_logits.transpose(-1, -2) @ query, at_value


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Derivative of an elementwise function, by forward mode."""
    return jvp(function, (x,), (torch.ones_like(x),))[1]
