"""Linear datamodeling score: do summed scores of the kept rows rank retrained models as they really rank?

Park et al. 2023 (TRAK), section 4: for a query, the Spearman correlation over random subsets between the predicted and
the measured outcome of training on the subset; averaged over queries.
"""

from dataclasses import dataclass

import torch
from scipy.stats import bootstrap, spearmanr
from torch import Tensor


@dataclass(frozen=True)
class LDS:
    """Result of [`lds`].

    Attributes:
        mean (`float`): over queries.
        low, high (`float`): 95 % bootstrap interval over queries.
        per_query (`Tensor`): (queries,).
    """

    mean: float
    low: float
    high: float
    per_query: Tensor


def lds(scores: Tensor, subsets: Tensor, outcomes: Tensor, seed: int = 0) -> LDS:
    """Linear datamodeling score of a matrix of scores.

    Args:
        scores (`Tensor`): (queries, rows); a larger score says that the row makes the query likelier.
        subsets (`Tensor`): (subsets, rows), booleans or weights: what each retraining kept.
        outcomes (`Tensor`): (subsets, queries) losses after retraining, in nats. They are negated here, so that a
            method of the right sign scores above zero.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    wanted = (subsets.shape[0], scores.shape[0])
    if tuple(outcomes.shape) != wanted or subsets.shape[1] != scores.shape[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} (queries, rows), subsets {tuple(subsets.shape)} (subsets, rows) and "
            f"outcomes {tuple(outcomes.shape)} do not fit; outcomes must be (subsets, queries) = {wanted}"
        )
    for name, value in (("scores", scores), ("outcomes", outcomes)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} hold values that are not finite")
    predicted = subsets.double() @ scores.double().T
    return _summary(predicted, -outcomes.double(), seed)


def noise_ceiling(outcomes: Tensor, seed: int = 0) -> LDS:
    """What a perfect prediction of the mean could reach: one retraining against the mean of the others.

    Args:
        outcomes (`Tensor`): (seeds, subsets, queries), at least two seeds. Every seed is left out once.
    """
    if len(outcomes) < 2:
        raise ValueError(
            f"outcomes of {len(outcomes)} seed(s): the noise ceiling compares retrainings, so it needs two"
        )
    others = [outcomes[torch.arange(len(outcomes)) != i].mean(0) for i in range(len(outcomes))]
    singles = [_summary(one, rest, seed) for one, rest in zip(outcomes, others, strict=True)]
    mean = torch.stack([single.per_query for single in singles]).mean(0)
    return _interval(mean, seed)


def _summary(predicted: Tensor, measured: Tensor, seed: int) -> LDS:
    """Spearman per column of (subsets, queries) pairs; a constant prediction counts as zero."""
    values = []
    for query in range(predicted.shape[1]):
        x, y = predicted[:, query], measured[:, query]
        flat = bool((x == x[0]).all()) or bool((y == y[0]).all())
        values.append(0.0 if flat else float(spearmanr(x.numpy(), y.numpy()).statistic))
    return _interval(torch.tensor(values, dtype=torch.float64), seed)


def _interval(per_query: Tensor, seed: int) -> LDS:
    mean = float(per_query.mean())
    if len(per_query) < 2 or bool((per_query == per_query[0]).all()):
        return LDS(mean, mean, mean, per_query)
    interval = bootstrap((per_query.numpy(),), lambda x, axis: x.mean(axis), rng=seed, method="percentile")
    low, high = interval.confidence_interval
    return LDS(mean, float(low), float(high), per_query)
