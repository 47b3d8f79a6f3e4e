"""Ridge regression of directional derivatives on what a forward pass shows, with closed-form leave-one-out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError, UnsupportedError


__all__ = ["DerivativeRegression", "explained_variance"]

_RIDGES = tuple(10.0 ** (power / 2) for power in range(-8, 9))  # relative to the mean eigenvalue of the kernel


@dataclass(frozen=True)
class DerivativeRegression:
    """Linear map from a query's features to its directional derivatives, or to a predictor's errors in them.

    Attributes:
        weights (`Tensor`): (F, K) float32, of centred and scaled features.
        means, scales (`Tensor`): (F,) float32; a feature f enters as (f - mean) * scale.
        intercepts (`Tensor`): (K,) float32, the targets' means.
        ridge (`float`): chosen ridge, relative to the mean eigenvalue of the kernel; `inf` if predicting the targets'
            means has the smallest leave-one-out error.
        left_out (`Tensor`): (m, K) float32, what the regression without row i predicts for row i.
    """

    weights: Tensor
    means: Tensor
    scales: Tensor
    intercepts: Tensor
    ridge: float
    left_out: Tensor

    @classmethod
    def fit(
        cls,
        features: Tensor,
        targets: Tensor,
        group_sizes: Sequence[int] | None = None,
        coordinates: Tensor | None = None,
    ) -> "DerivativeRegression":
        """Fit on sample rows; the ridge with the smallest leave-one-out error is chosen.

        The intercept is not penalised, so with H the hat matrix the prediction without row i is
        y_i - (y_i - ŷ_i) / (1 - H_ii) exactly, at fixed scales and ridge (Allen's PRESS, 1974).

        Args:
            features (`Tensor`): (m, F), m >= 3.
            targets (`Tensor`): (m, K).
            group_sizes (`Sequence[int]`, *optional*): sizes of consecutive groups of features, which sum to F; every
                group is scaled to the same total variance. One group by default.
            coordinates (`Tensor`, *optional*): (n, K) of training rows, by which leave-one-out errors are weighted.

        Raises:
            NumericalError: a feature or a target is not finite.
            UnsupportedError: fewer than three rows, or group sizes that do not sum to F.
        """
        rows, sizes = len(features), list(group_sizes or [features.shape[1]])
        if rows < 3 or len(targets) != rows or sum(sizes) != features.shape[1]:
            raise UnsupportedError(
                f"features {tuple(features.shape)}, targets {tuple(targets.shape)}, group sizes {sizes}: a regression "
                "needs at least three rows of both and groups that sum to all features. Pass more sample rows"
            )
        x, y = features.double(), targets.double()
        _refuse_non_finite(x, y)
        means, intercepts = x.mean(0), y.mean(0)
        x, y = x - means, y - intercepts
        scales = _scales(x, sizes)
        x *= scales
        values, vectors = torch.linalg.eigh(x @ x.T)
        values = values.clamp(min=0.0)
        metric = _metric(coordinates, y)
        if not bool(metric.isfinite().all()):
            raise NumericalError("coordinates of rows: not finite. No ridge could be chosen. Build the bank again")
        unit = float(values.mean())
        best, ridge, residuals = float("inf"), float("inf"), y
        for candidate in [*_RIDGES, float("inf")] if unit > 0 else [float("inf")]:
            shrunk = values / (values + candidate * unit) if candidate < float("inf") else torch.zeros_like(values)
            fitted = vectors @ (shrunk.unsqueeze(1) * (vectors.T @ y))
            leverages = 1 / rows + vectors.square() @ shrunk
            left = (y - fitted) / (1 - leverages).clamp(min=1e-12).unsqueeze(1)
            loss = float(((left @ metric) * left).sum())
            if loss < best:
                best, ridge, residuals = loss, candidate, left
        weights = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
        if ridge < float("inf"):
            weights = x.T @ (vectors @ ((vectors.T @ y) / (values + ridge * unit).unsqueeze(1)))
        left_out = targets.double() - residuals
        return cls(weights.float(), means.float(), scales.float(), intercepts.float(), ridge, left_out.float())

    def predict(self, features: Tensor) -> Tensor:
        """Predict the targets of queries: (queries, F) -> (queries, K) float32.

        Raises:
            UnsupportedError: another number of features than was fitted.
        """
        if features.shape[1] != len(self.means):
            raise UnsupportedError(
                f"features of a query: {features.shape[1]}. The regression was fitted on {len(self.means)}. Use the "
                "model and the feature settings that the bank was built with"
            )
        scaled = (features.double() - self.means.double()) * self.scales.double()
        return (scaled @ self.weights.double() + self.intercepts.double()).float()


def explained_variance(predicted: Tensor, targets: Tensor, coordinates: Tensor | None = None) -> float:
    """Return the share of the variance of rows' scores that predictions explain: 1 at best, below 0 if they harm.

    Args:
        predicted, targets (`Tensor`): (queries, K); pass leave-one-out predictions for a share on unseen queries.
        coordinates (`Tensor`, *optional*): (n, K); a row's score is its product with a query's derivatives, and the
            variance is over rows. Without it all K derivatives count equally.
    """
    y = targets.double()
    error, metric = predicted.double() - y, _metric(coordinates, y)
    return 1.0 - float(((error @ metric) * error).sum()) / float(((y @ metric) * y).sum())


def _refuse_non_finite(features: Tensor, targets: Tensor) -> None:
    if not bool(features.isfinite().all()) or not bool(targets.isfinite().all()):
        raise NumericalError(
            "features or targets of the regression: not finite. No score would be right. Check the model for overflow "
            "in half precision"
        )


def _metric(coordinates: Tensor | None, like: Tensor) -> Tensor:
    """Return the covariance of coordinates over rows, (K, K) float64, or the identity."""
    if coordinates is None:
        return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    centred = coordinates.to(like) - coordinates.to(like).mean(0)
    return centred.T @ centred / len(centred)


def _scales(centred: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return (F,) factors that give every group a total variance of one; 0 where a group is constant."""
    totals = [part.square().sum(1).mean() for part in centred.split(list(sizes), 1)]
    scales = [torch.where(total > 0, total.clamp(min=1e-300).rsqrt(), 0.0) for total in totals]
    return torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)])
