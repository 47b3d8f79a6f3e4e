"""A mean over queries with the interval in which it would fall for other queries."""

from dataclasses import dataclass

import torch
from scipy.stats import bootstrap, spearmanr
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean over queries.

    Attributes:
        mean (`float`): over queries.
        low, high (`float`): 95 % bootstrap interval over queries (percentiles).
        per_query (`Tensor`): (queries,), float64.
    """

    mean: float
    low: float
    high: float
    per_query: Tensor

    @classmethod
    def of(cls, per_query: Tensor, seed: int = 0) -> "Interval":
        """The interval of values (queries,); without width where there are no two different ones."""
        per_query = per_query.double()
        mean = float(per_query.mean())
        if len(per_query) < 2 or bool((per_query == per_query[0]).all()):
            return cls(mean, mean, mean, per_query)
        found = bootstrap((per_query.numpy(),), lambda x, axis: x.mean(axis), rng=seed, method="percentile")
        low, high = found.confidence_interval
        return cls(mean, float(low), float(high), per_query)


def finite(**named: Tensor) -> None:
    """Refuse tensors with values that are not finite.

    Raises:
        ValueError: the first that has one, by its name.
    """
    for name, value in named.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} hold values that are not finite")


@dataclass(frozen=True)
class Agreement:
    """How well predicted changes agree with measured ones.

    Attributes:
        spearman (`Interval`): rank correlation over what was left out, per query, and its mean over queries.
        pearson (`float`): correlation over all pairs of query and what was left out.
        cosine (`float`): the same without subtracting means, so that a common shift counts.
        slope (`float`): of measured on predicted through the origin, over all pairs: 1 where scores are nats, below 1
            where they promise too much. 0 where nothing was predicted.
        predicted, measured (`Tensor`): (queries, left out), nats of loss.
    """

    spearman: Interval
    pearson: float
    cosine: float
    slope: float
    predicted: Tensor
    measured: Tensor

    def summary(self) -> dict[str, float]:
        """The figures alone, rounded to four digits."""
        values = {
            "spearman": self.spearman.mean, "spearman_low": self.spearman.low, "spearman_high": self.spearman.high,
            "pearson": self.pearson, "cosine": self.cosine, "slope": self.slope,
        }  # fmt: skip
        return {name: round(value, 4) for name, value in values.items()}


def agreement(predicted: Tensor, measured: Tensor, seed: int = 0) -> Agreement:
    """Compare changes of losses.

    Args:
        predicted, measured (`Tensor`): (queries, left out): by how much each query's loss rises, in nats, when
            something is left out.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    if predicted.ndim != 2 or predicted.shape != measured.shape:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and measured {tuple(measured.shape)} changes must both be "
            "(queries, left out)"
        )
    finite(predicted=predicted, measured=measured)
    x, y = predicted.double(), measured.double()
    power = float((x * x).sum())
    centred = x - x.mean(), y - y.mean()
    return Agreement(
        spearman=Interval.of(spearman(x.T, y.T), seed),
        pearson=_cosine(*centred),
        cosine=_cosine(x, y),
        slope=float((x * y).sum()) / power if power > 0 else 0.0,
        predicted=x,
        measured=y,
    )


def spearman(predicted: Tensor, measured: Tensor) -> Tensor:
    """Rank correlation of each column of two (n, queries) matrices, (queries,); a constant column counts as zero."""
    values = []
    for query in range(predicted.shape[1]):
        x, y = predicted[:, query], measured[:, query]
        flat = bool((x == x[0]).all()) or bool((y == y[0]).all())
        values.append(0.0 if flat else float(spearmanr(x.numpy(), y.numpy()).statistic))
    return torch.tensor(values, dtype=torch.float64)


def _cosine(x: Tensor, y: Tensor) -> float:
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def loo(scores: Tensor, left_out: Tensor, outcomes: Tensor, seed: int = 0) -> Agreement:
    """Compare scores with real leave-one-out.

    Args:
        scores (`Tensor`): (queries, rows) in nats: without the row, a query's loss rises by its score.
        left_out (`Tensor`): (n,) positions of the rows that were left out.
        outcomes (`Tensor`): (n + 1, queries) losses, first with all rows, then without each: what `retrain` gives for
            [`without_rows`] and one seed.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    wanted = (len(left_out) + 1, scores.shape[0])
    if tuple(outcomes.shape) != wanted:
        raise ValueError(
            f"outcomes {tuple(outcomes.shape)} must be (all rows and {len(left_out)} left out, queries) = {wanted}"
        )
    if not bool(((left_out >= 0) & (left_out < scores.shape[1])).all()):
        raise ValueError(f"left_out names rows beyond the {scores.shape[1]} that have scores")
    measured = (outcomes[1:] - outcomes[0]).T
    return agreement(scores[:, left_out], measured, seed)


def summed(scores: Tensor, owner: Tensor, sources: int) -> Tensor:
    """(queries, sources): scores of rows (queries, rows) summed over each source; rows of source -1 go nowhere."""
    if owner.shape != scores.shape[1:]:
        raise ValueError(
            f"owner {tuple(owner.shape)} must name the source of each of the {scores.shape[1]} rows that have scores"
        )
    member = torch.zeros(scores.shape[1], sources, dtype=torch.float64)
    inside = owner >= 0
    member[inside.nonzero().flatten(), owner[inside]] = 1.0
    return scores.double() @ member


def leave_sources_out(source_scores: Tensor, left_out: Tensor, outcomes: Tensor, seed: int = 0) -> Agreement:
    """Compare scores of sources with real removal.

    Args:
        source_scores (`Tensor`): (queries, sources) in nats, a bank's own or rows' [`summed`].
        left_out (`Tensor`): (n,) sources that were left out.
        outcomes (`Tensor`): (n + 1, queries) losses, first with all rows, then without each source.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    return loo(source_scores, left_out, outcomes, seed)
