"""Features of a query whose gradient is predicted: its predicted derivatives along directions, by groups of weights.

A predictor is better in some layers than in others. What each group of weights contributes to a derivative, kept
apart, lets a regression weigh the groups by how well they are predicted.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


__all__ = ["column_groups", "grouped_derivatives"]

_GROUPS = 16  # of consecutive weights, at most


def column_groups(sizes: Sequence[int], most: int = _GROUPS) -> list[slice]:
    """Return the columns of at most `most` groups of consecutive weights, given each weight's number of elements."""
    count = min(most, len(sizes))
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    bounds = [ends[group * len(sizes) // count] for group in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def grouped_derivatives(gradients: Tensor, directions: Tensor, groups: Sequence[slice], first: int = 0) -> Tensor:
    """Return what each group of columns contributes to the derivatives of (n, P) along (k, P): (n, groups k).

    Args:
        first (`int`): column of P at which both tensors begin, where they hold a part of the columns.
    """
    parts = []
    for group in groups:
        own = slice(max(group.start - first, 0), max(group.stop - first, 0))
        parts.append(gradients[:, own] @ directions[:, own].T)
    return torch.cat(parts, 1)
