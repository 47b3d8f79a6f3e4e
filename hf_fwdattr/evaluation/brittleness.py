"""Brittleness: how many of the rows ranked first must go before an answer is lost? Fewer is a better ranking."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Brittleness:
    """Result of [`brittleness`].

    Attributes:
        counts (`Tensor`): (levels,) numbers of rows left out.
        lost (`Tensor`): (levels,) share of queries whose answer was lost with so many rows or with fewer.
        smallest (`Tensor`): (queries,) the fewest rows that lost it; infinite where none of the levels did.
    """

    counts: Tensor
    lost: Tensor
    smallest: Tensor


def brittleness(answered: Tensor, counts: Tensor) -> Brittleness:
    """Summarise retrainings without the first rows.

    Args:
        answered (`Tensor`): (levels, queries) booleans: the answer is still given after leaving out that many of the
            query's first rows (see `removal.without_top`).
        counts (`Tensor`): (levels,) numbers of rows left out, ascending.

    Raises:
        ValueError: shapes that do not fit, or counts that do not ascend.
    """
    if answered.dtype != torch.bool or answered.ndim != 2 or answered.shape[0] != len(counts):
        raise ValueError(
            f"answered must be booleans (levels, queries) with {len(counts)} levels, not {answered.dtype} "
            f"{tuple(answered.shape)}"
        )
    if bool((counts.diff() <= 0).any()):
        raise ValueError(f"counts={counts.tolist()} must ascend")
    needed = torch.where(answered, torch.inf, counts.double()[:, None])
    smallest = needed.min(0).values
    lost = (smallest[None] <= counts.double()[:, None]).double().mean(1)
    return Brittleness(counts, lost, smallest)
