"""Regression of what remains of a query's derivatives, fitted on the sample rows, whose derivatives are known."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gradients.derivative_regression import DerivativeRegression, FeatureTable, fit_regression
from ..gradients.predicted_derivatives import column_groups, grouped_derivatives
from .low_rank import LowRankBasis
from .passes import Passes
from .storage import blocks


__all__ = ["RowFeatures", "SampleRegression", "regress"]

RowFeatures = Callable[[list[int]], FeatureTable | None]
"""Returns features of rows, or None if the model has none. Called by rank 0, at the weights for queries."""


@dataclass(frozen=True)
class SampleRegression:
    """A regression, and what it leaves of the sample rows' scores.

    Attributes:
        regression (`DerivativeRegression`): from a query's features to its expected derivatives along the directions,
            beyond the predicted ones.
        error_variances (`Tensor`): (k,) mean squares of what remains along the directions of rows left out, float64.
        explained_variance (`float`): share of the variance of their scores that is then known; may be negative.
    """

    regression: DerivativeRegression
    error_variances: Tensor
    explained_variance: float


def regress(
    passes: Passes,
    rows: Tensor,
    basis: LowRankBasis,
    gradients: Tensor,
    errors: Tensor | None,
    features: RowFeatures | None,
) -> SampleRegression | None:
    """Fit a regression on the sample rows; collective. None on ranks beyond 0, without features, or without a gain.

    Args:
        passes (`Passes`): the passes.
        rows (`Tensor`): (m,) the sample rows, ascending.
        basis (`LowRankBasis`): the directions.
        gradients (`Tensor`): (m, own columns).
        errors (`Tensor`, *optional*): (m, own columns), gradients less predicted ones. With them, features are the
            predicted derivatives; otherwise they come from `features`.
        features (`Callable`, *optional*): features of rows; see `RowFeatures`.
    """
    table: FeatureTable | None = None
    if errors is not None:
        table = _predicted_derivatives(passes, basis, gradients, errors)
    with passes.ranks.raise_on_all_ranks():
        if passes.ranks.rank > 0:
            return None
        if errors is None and features is not None:
            table = features(rows.tolist())
        return None if table is None else _fit(basis, table)


def _predicted_derivatives(passes: Passes, basis: LowRankBasis, gradients: Tensor, errors: Tensor) -> FeatureTable:
    """Return the predicted derivatives (m, groups k) of sample rows by groups of weights."""
    groups = column_groups(passes.stream.parameters.sizes)
    result = torch.zeros(len(gradients), len(groups) * len(basis.directions))
    for lines in blocks(len(gradients), passes.chunk):
        predicted = gradients[lines] - errors[lines]
        result[lines] = grouped_derivatives(predicted, basis.directions, groups, passes.columns.start).float()
    return FeatureTable(passes.ranks.total(result), [len(basis.directions)] * len(groups), len(groups))


def _fit(basis: LowRankBasis, table: FeatureTable) -> SampleRegression | None:
    """Fit on derivatives in the units of scores, so that every one counts by what it means for the rows' scores."""
    scores, norms = basis.scores.without_own(), basis.coordinates.norm(dim=0)
    remaining = scores.remaining @ (basis.coordinates / norms)
    fitted = fit_regression(table, remaining)
    if fitted is None:
        return None
    regression, left_out = fitted
    errors = remaining - left_out
    unexplained = scores.remaining.square().sum() - remaining.square().sum() + errors.square().sum()
    return SampleRegression(
        regression.along(1 / norms), errors.square().mean(0) / norms.square(),
        1.0 - float(unexplained / scores.whole.square().sum()),
    )  # fmt: skip
