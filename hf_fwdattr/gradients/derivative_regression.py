"""Ridge regression of a query's directional derivatives on what one forward pass shows of it.

Every sample row was a query once: its derivatives along the directions are known, and so is what a gradient predictor
leaves of them. A linear map from features of the forward pass to these remainders, fitted on the sample rows, tells
what to expect of a new query before anything of it is read. The ridge is chosen by the error on rows that were left
out, in closed form: with H the hat matrix and an intercept that is not penalised, the error without row i is
(y_i - ŷ_i) / (1 - H_ii) (Allen's PRESS, 1974). Where that is hardly less than expecting nothing, there is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericalError, UnsupportedError


__all__ = ["LEAST_ROWS", "DerivativeRegression", "FeatureTable", "fit_regression"]

LEAST_ROWS = 48  # sample rows: with fewer, the error on rows left out is too uncertain to choose by
_RIDGES = tuple(10.0 ** (power / 2) for power in range(-8, 9))  # relative to the mean eigenvalue of the kernel
_LEAST_GAIN = 0.02  # share of what remains that must be predicted; less is not worth its bytes


@dataclass(frozen=True)
class FeatureTable:
    """Features of the sample rows.

    Attributes:
        values (`Tensor`): (m, F).
        group_sizes (`list[int]`): sizes of consecutive groups of features, F in total; every group is scaled to the
            same variance in total.
        leading (`int`): so many groups are also tried without the others, which few rows may be too few for.
    """

    values: Tensor
    group_sizes: list[int]
    leading: int

    def standardized(self, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred and scaled features (m, F), their means and scales (F,), in the features' dtype.

        Groups beyond the first `groups`, and those that are constant but for rounding, are scaled by zero.
        """
        means = self.values.mean(0)
        centred, scales = self.values - means, torch.zeros_like(means)
        rounding = torch.finfo(means.dtype).eps ** 2
        parts = [part.split(self.group_sizes, -1) for part in (centred, means, scales)]
        for values, mean, scale in list(zip(*parts, strict=True))[:groups]:
            total = float(values.square().sum(1).mean())
            if total > rounding * float(mean.square().sum()):
                scale.fill_(total**-0.5)
        return centred.mul_(scales), means, scales


@dataclass(frozen=True)
class DerivativeRegression:
    """Affine map from a query's features to what remains of its derivatives; float32.

    Attributes:
        weights (`Tensor`): (F, k) of centred and scaled features.
        means, scales (`Tensor`): (F,); a feature f enters as (f - mean) scale.
        intercepts (`Tensor`): (k,).
    """

    weights: Tensor
    means: Tensor
    scales: Tensor
    intercepts: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Predict from features (queries, F): (queries, k), float64.

        Raises:
            UnsupportedError: another number of features than was fitted.
        """
        if features.shape[1] != len(self.weights):
            raise UnsupportedError(
                f"features of a query: {features.shape[1]}. The regression was fitted on {len(self.weights)}, so "
                "their meaning is unknown. Use the model that the bank was built with"
            )
        scaled = (features.double() - self.means.double()) * self.scales.double()
        return scaled @ self.weights.double() + self.intercepts.double()

    def along(self, factors: Tensor) -> "DerivativeRegression":
        """Return the regression of the derivatives times factors (k,), as where directions have other lengths."""
        return replace(self, weights=self.weights * factors.float(), intercepts=self.intercepts * factors.float())

    def tensors(self) -> dict[str, Tensor]:
        """Return the regression as a bank keeps it: intercepts are the last line, of a feature that is always 1."""
        return {
            "weights": torch.cat([self.weights, self.intercepts[None]]).bfloat16(),
            "means": torch.cat([self.means, torch.zeros(1)]),
            "scales": torch.cat([self.scales, torch.ones(1)]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "DerivativeRegression":
        """Return the regression that `tensors` returned."""
        weights = tensors["weights"].float()
        return cls(weights[:-1], tensors["means"][:-1], tensors["scales"][:-1], weights[-1])


def fit_regression(table: FeatureTable, targets: Tensor) -> tuple[DerivativeRegression, Tensor] | None:
    """Fit on sample rows; return the regression and what it predicts of each row that is left out, or None.

    Args:
        table (`FeatureTable`): features (m, F).
        targets (`Tensor`): (m, k); all count alike in the choice of the ridge.

    Returns:
        The regression and (m, k) float64 predictions. None with fewer than `LEAST_ROWS` rows, or where the rows left
        out are hardly predicted better than by zero.

    Raises:
        NumericalError: a feature or a target is not finite.
    """
    if not bool(table.values.isfinite().all() and targets.isfinite().all()):
        raise NumericalError(
            "features or derivatives of the sample rows: not finite. No score would be right. Check the model for "
            "overflow in half precision"
        )
    if len(targets) < LEAST_ROWS:
        return None
    y, most = targets.double(), len(table.group_sizes)
    fits = [_Fit(table, groups, y) for groups in sorted({min(table.leading, most), most})]
    best = min(fits, key=lambda fit: fit.error)
    if not best.error < (1 - _LEAST_GAIN) * float(y.square().sum()):
        return None
    return best.regression, y - best.left_out


class _Fit:
    """The best ridge regression on the leading groups of features.

    Attributes:
        regression (`DerivativeRegression`): the regression.
        left_out (`Tensor`): (m, k) errors of each row's prediction by the others.
        error (`float`): sum of their squares.
    """

    def __init__(self, table: FeatureTable, groups: int, targets: Tensor):
        x, means, scales = table.standardized(groups)
        spectrum = _Spectrum(x, targets)
        ridge = min(_RIDGES, key=spectrum.left_out_error)
        self.left_out, self.error = spectrum.left_out(ridge), spectrum.left_out_error(ridge)
        weights = x.T @ spectrum.row_coefficients(ridge).to(x.dtype)
        self.regression = DerivativeRegression(weights.float(), means.float(), scales.float(), spectrum.mean.float())


class _Spectrum:
    """Ridge solutions for every ridge, from one eigendecomposition of the kernel of centred features."""

    def __init__(self, features: Tensor, targets: Tensor):
        self.mean = targets.mean(0)
        values, self._vectors = torch.linalg.eigh((features @ features.T).double())
        self._values = values.clamp(min=0.0)
        self._unit = self._values.mean().clamp(min=torch.finfo(values.dtype).tiny)
        self._targets = self._vectors.T @ (targets - self.mean)

    def row_coefficients(self, ridge: float) -> Tensor:
        """Return the coefficients (m, k) of the sample rows."""
        return self._vectors @ (self._targets / (self._values + ridge * self._unit)[:, None])

    def left_out(self, ridge: float) -> Tensor:
        """Return the errors (m, k) of each row's prediction by the others."""
        kept = ridge * self._unit / (self._values + ridge * self._unit)
        residuals = self._vectors @ (self._targets * kept[:, None])
        own = self._vectors.square() @ kept - 1 / len(self._vectors)  # 1 - H_ii
        return residuals / own.clamp(min=torch.finfo(own.dtype).eps)[:, None]

    def left_out_error(self, ridge: float) -> float:
        """Return the sum of squares of `left_out`."""
        return float(self.left_out(ridge).square().sum())
