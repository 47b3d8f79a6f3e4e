"""How far what is written out may be from what a model computed."""

import torch
from torch import Tensor


_FULL, _HALF = 1e-3, 3e-2  # relative, at each position; in half precision


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors (..., d) are equal up to rounding wherever one looks."""
    if one.shape != other.shape:
        return False
    full = all(part.dtype in (torch.float32, torch.float64) for part in (one, other))
    return bool(((one - other).norm(dim=-1) <= (_FULL if full else _HALF) * other.norm(dim=-1)).all())
