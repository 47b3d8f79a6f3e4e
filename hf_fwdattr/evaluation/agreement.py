"""Agreement between predicted and measured changes of losses, and the interval of a mean over queries."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


__all__ = [
    "Agreement",
    "Interval",
    "agreement",
    "loo",
    "require_finite",
    "scipy_stats",
    "spearman",
    "sum_over_sources",
]


def scipy_stats() -> Any:
    """Return the module `scipy.stats`.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "evaluation: scipy is not installed. Run: pip install 'hf-fwdattr[eval]'", name="scipy"
        ) from error
    return stats


@dataclass(frozen=True)
class Interval:
    """A mean over queries with the interval in which it would fall for other queries.

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
        """Compute the interval of values (queries,); its width is zero where no two values differ."""
        per_query = per_query.double()
        mean = float(per_query.mean())
        if len(per_query) < 2 or bool((per_query == per_query[0]).all()):
            return cls(mean, mean, mean, per_query)
        bootstrap = scipy_stats().bootstrap
        result = bootstrap((per_query.numpy(),), lambda x, axis: x.mean(axis), rng=seed, method="percentile")
        low, high = result.confidence_interval
        return cls(mean, float(low), float(high), per_query)


def require_finite(**tensors: Tensor) -> None:
    """Refuse tensors with values that are not finite.

    Raises:
        ValueError: the first such tensor, by its name.
    """
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} hold values that are not finite")


@dataclass(frozen=True)
class Agreement:
    """Agreement between predicted and measured changes.

    Attributes:
        spearman (`Interval`): rank correlation over the removals, per query, and its mean over queries.
        pearson (`float`): correlation over all pairs of query and removal.
        cosine (`float`): the same without subtracting means, so that a common shift counts.
        slope (`float`): regression of measured on predicted changes through the origin, over all pairs: 1 where scores
            are in nats, below 1 where they are too large. 0 where every prediction is zero.
        predicted, measured (`Tensor`): (queries, removals), nats of loss.
    """

    spearman: Interval
    pearson: float
    cosine: float
    slope: float
    predicted: Tensor
    measured: Tensor

    def summary(self) -> dict[str, float]:
        """Return the numbers without the tensors, rounded to four digits."""
        values = {
            "spearman": self.spearman.mean, "spearman_low": self.spearman.low, "spearman_high": self.spearman.high,
            "pearson": self.pearson, "cosine": self.cosine, "slope": self.slope,
        }  # fmt: skip
        return {name: round(value, 4) for name, value in values.items()}


def agreement(predicted: Tensor, measured: Tensor, seed: int = 0) -> Agreement:
    """Compare predicted with measured changes of losses.

    Args:
        predicted, measured (`Tensor`): (queries, removals): the rise of each query's loss in nats after each removal.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    if predicted.ndim != 2 or predicted.shape != measured.shape:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and measured {tuple(measured.shape)} changes must both be "
            "(queries, left out)"
        )
    require_finite(predicted=predicted, measured=measured)
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
    """Compute the rank correlation of each column of two (n, queries) matrices: (queries,), constant columns zero."""
    spearmanr = scipy_stats().spearmanr
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
    """Compare scores with retraining without one row, or one source, at a time.

    Args:
        scores (`Tensor`): (queries, rows) in nats: without the row, a query's loss rises by its score. Or (queries,
            sources): a bank's own, or [`sum_over_sources`] of rows'.
        left_out (`Tensor`): (n,) indices of the rows, or sources, that were left out.
        outcomes (`Tensor`): (n + 1, queries) losses, first with all rows, then without each row: the result of
            [`retrain`] on [`without_rows`] for one seed.

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


def sum_over_sources(scores: Tensor, row_sources: Tensor, sources: int) -> Tensor:
    """Sum scores of rows (queries, rows) over each source: (queries, sources).

    Args:
        row_sources (`Tensor`): (rows,) source of each row; rows of source -1 belong to none.

    Raises:
        ValueError: not one source per row.
    """
    if row_sources.shape != scores.shape[1:]:
        raise ValueError(
            f"row_sources {tuple(row_sources.shape)} must name the source of each of the {scores.shape[1]} rows that "
            "have scores"
        )
    member = torch.zeros(scores.shape[1], sources, dtype=torch.float64)
    inside = row_sources >= 0
    member[inside.nonzero().flatten(), row_sources[inside]] = 1.0
    return scores.double() @ member
