"""Known teachers: are the rows that taught a fact ranked first?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .interval import Interval, finite


@dataclass(frozen=True)
class Recall:
    """Result of [`recall`].

    Attributes:
        at (`dict[int, Interval]`): recall@k: share of a query's teachers among its first k rows.
        hits (`dict[int, Interval]`): share of queries with a teacher among the first k.
        mrr (`Interval`): mean reciprocal rank of the first teacher.
    """

    at: dict[int, Interval]
    hits: dict[int, Interval]
    mrr: Interval


def recall(scores: Tensor, teachers: Tensor, ks: tuple[int, ...] = (1, 5, 50), seed: int = 0) -> Recall:
    """Rank rows by score and look where the teachers stand.

    Among equal scores teachers stand last, so that a method that says nothing finds nothing.

    Args:
        scores (`Tensor`): (queries, rows).
        teachers (`Tensor`): (queries, rows) booleans; every query has one at least.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a query without a teacher.
    """
    if scores.shape != teachers.shape or scores.ndim != 2 or teachers.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores.shape)} and teachers {tuple(teachers.shape)} {teachers.dtype} must both be "
            "(queries, rows), the second booleans"
        )
    finite(scores=scores)
    if not bool(teachers.any(1).all()):
        bad = (~teachers.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"queries {bad} have no teacher among the rows, so nothing could be found: leave them out")
    last = teachers.long().argsort(dim=1, stable=True)
    order = last.gather(1, scores.gather(1, last).argsort(dim=1, descending=True, stable=True))
    found = teachers.gather(1, order)
    first = found.long().argmax(1) + 1
    total = teachers.sum(1)
    return Recall(
        at={k: Interval.of(found[:, :k].sum(1) / total, seed) for k in ks},
        hits={k: Interval.of((first <= k).double(), seed) for k in ks},
        mrr=Interval.of(1.0 / first.double(), seed),
    )
