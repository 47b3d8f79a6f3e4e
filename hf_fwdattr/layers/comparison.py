"""Comparisons between recomputed tensors and those of the model."""

import torch
from torch import Tensor


__all__ = ["identical", "nearly_equal"]

_FULL, _HALF = 1e-3, 3e-2  # relative, at each position; in half precision


def nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors (..., d) are equal up to rounding at every position."""
    if one.shape != other.shape:
        return False
    full = all(part.dtype in (torch.float32, torch.float64) for part in (one, other))
    return bool(((one - other).norm(dim=-1) <= (_FULL if full else _HALF) * other.norm(dim=-1)).all())


def identical(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal to the bit.

    In a residual stream with a few huge entries, differences in all others would pass for rounding.
    """
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
