"""Query loss difference: how much worse does a query become without the rows that were ranked first for it?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .interval import Interval, finite


@dataclass(frozen=True)
class Removal:
    """Result of [`removal`], in nats of loss.

    Attributes:
        top (`Interval`): rise of each query's loss without the rows ranked first for it.
        random (`Interval`): rise without as many random rows.
    """

    top: Interval
    random: Interval


def without_top(scores: Tensor, count: int) -> Tensor:
    """(queries, rows) booleans for `retrain`: for each query all rows but the `count` of the highest scores.

    Raises:
        ValueError: not between 1 and all rows but one.
    """
    if not 1 <= count < scores.shape[1]:
        raise ValueError(f"count={count}: leave out at least one of {scores.shape[1]} rows, and not all")
    kept = torch.ones(scores.shape, dtype=torch.bool)
    kept.scatter_(1, scores.topk(count, dim=1).indices, False)
    return kept


def without_random(rows: int, count: int, draws: int, seed: int = 0) -> Tensor:
    """(draws, rows) booleans for `retrain`, each line without `count` random rows."""
    generator = torch.Generator().manual_seed(seed)
    return without_top(torch.rand(draws, rows, generator=generator), count)


def removal(outcomes: Tensor, random: Tensor, base: Tensor, seed: int = 0) -> Removal:
    """Compare removed rows with random ones.

    Args:
        outcomes (`Tensor`): (queries, queries) losses; line q is the retraining without query q's own first rows.
            Only its own loss is looked at: the diagonal.
        random (`Tensor`): (draws, queries) losses after leaving out as many random rows.
        base (`Tensor`): (queries,) losses with all rows.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    queries = len(base)
    if tuple(outcomes.shape) != (queries, queries) or random.ndim != 2 or random.shape[1] != queries:
        raise ValueError(
            f"for base (queries,) = ({queries},), outcomes must be (queries, queries) and random (draws, queries), "
            f"not {tuple(outcomes.shape)} and {tuple(random.shape)}"
        )
    finite(outcomes=outcomes, random=random, base=base)
    own = outcomes.double().diagonal()
    return Removal(Interval.of(own - base, seed), Interval.of(random.double().mean(0) - base, seed))
