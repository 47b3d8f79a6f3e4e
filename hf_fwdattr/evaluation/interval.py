"""A mean over queries with the interval in which it would fall for other queries."""

from dataclasses import dataclass

import torch
from scipy.stats import bootstrap
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
