"""Predicted against measured changes of losses, in nats: do they agree in order, in shape, and in size?"""

from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from .interval import Interval, finite


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
