"""Gaussian process over the scores of one query: a few exact scores improve the estimates of all others.

A query's derivatives along the directions of a bank are predicted, or expected from its first pass, or to be zero.
What remains of them is uncorrelated between directions, with variances known from the training set, whose rows served
as queries once. A row's score follows from the derivatives by its coordinates, but for the row's part outside the
directions, which has a variance of its own. An exact score of a direction or of a row is one linear observation; given
n of them, what remains is estimated by a linear system of n unknowns (Gaussian process regression, or kriging:
Rasmussen and Williams 2006, eq. 2.25-2.26). Nothing here grows with the number of rows.
"""

import math

import torch
from torch import Tensor


__all__ = ["CandidateScores", "GaussianProcess"]

_NUGGET = 1e-4  # noise relative to the mean variance of observations: rounding of codes and of derivatives


class GaussianProcess:
    """Posterior of what remains of one query's derivatives along the directions.

    Args:
        variances (`Tensor`): (k,) prior variances; their scale does not matter, and is learnt from what is observed.
        expected (`Tensor`, *optional*): (k,) prior means; zero by default.
    """

    def __init__(self, variances: Tensor, expected: Tensor | None = None):
        self._variances = variances.double()
        self._expected = torch.zeros_like(self._variances) if expected is None else expected.double()
        self._weights = torch.zeros(0, len(variances), dtype=torch.float64)
        self._residuals, self._own = (torch.zeros(0, dtype=torch.float64) for _ in range(2))

    @property
    def observations(self) -> int:
        """Number of observations so far."""
        return len(self._residuals)

    def observe(self, weights: Tensor, residuals: Tensor, own: Tensor) -> None:
        """Add observations.

        Args:
            weights (`Tensor`): (n, k) coordinates of what was read exactly.
            residuals (`Tensor`): (n,) the exact scores less the predicted ones.
            own (`Tensor`): (n,) prior variances of the parts outside the directions.
        """
        self._weights = torch.cat([self._weights, weights.double()])
        self._residuals = torch.cat([self._residuals, residuals.double() - weights.double() @ self._expected])
        self._own = torch.cat([self._own, own.double()])

    def mean(self) -> Tensor:
        """Return the posterior mean of what remains along the directions: (k,), float64."""
        factor = self._factor()
        if factor is None:
            return self._expected.clone()
        solved = torch.cholesky_solve(self._residuals[:, None], factor)[:, 0]
        return self._expected + self._variances * (solved @ self._weights)

    def std(self, coordinates: Tensor, own: Tensor) -> Tensor:
        """Return the posterior standard deviation of scores (n,), float64; infinite without observations.

        Args:
            coordinates (`Tensor`): (n, k); products are in their dtype.
            own (`Tensor`): (n,) prior variances of the parts outside the directions.
        """
        factor = self._factor()
        if factor is None:
            return torch.full((len(coordinates),), float("inf"), dtype=torch.float64)
        covariance = self._covariance(factor).to(coordinates.dtype)
        variance = ((coordinates @ covariance) * coordinates).sum(1).double()
        return (self.scale(factor) * (variance.clamp(min=0.0) + own.double())).sqrt()

    def _covariance(self, factor: Tensor) -> Tensor:
        """Return the posterior covariance of the derivatives in units of `scale`, (k, k), float64."""
        known = torch.linalg.solve_triangular(factor, self._weights * self._variances, upper=False)
        return torch.diag(self._variances) - known.T @ known

    def scale(self, factor: Tensor | None = None) -> float:
        """Return this query's scale of the prior variances, from what was observed; 1 where nothing was."""
        factor = self._factor() if factor is None else factor
        if factor is None:
            return 1.0
        return float(torch.linalg.solve_triangular(factor, self._residuals[:, None], upper=False).square().mean())

    def _factor(self) -> Tensor | None:
        """Return the Cholesky factor of the observations' covariance; None if that is empty or zero."""
        gram = (self._weights * self._variances) @ self._weights.T + torch.diag(self._own)
        if not float(gram.diagonal().sum()) > 0:
            return None
        nugget = _NUGGET * gram.diagonal().mean()
        return torch.linalg.cholesky_ex(gram + nugget * torch.eye(len(gram), dtype=torch.float64))[0]


class CandidateScores:
    """Scores of the rows that may be named, given what was observed so far.

    Args:
        process (`GaussianProcess`): of this query.
        predicted (`Tensor`): (n,) predicted scores.
        coordinates (`Tensor`): (n, k).
        own (`Tensor`): (n,) prior variances of the rows' parts outside the directions.
    """

    def __init__(self, process: GaussianProcess, predicted: Tensor, coordinates: Tensor, own: Tensor):
        self.process, self.predicted = process, predicted.double()
        self._coordinates, self._own = coordinates, own.double()
        self._surprises = torch.zeros(0, dtype=torch.float64)

    def narrowed(self, row_indices: Tensor) -> "CandidateScores":
        """Return the scores of some candidates (n,), which learn from what is observed of any."""
        part = (self.predicted, self._coordinates, self._own)
        return CandidateScores(self.process, *(values[row_indices] for values in part))

    @property
    def surprise(self) -> float:
        """Root mean square of how far exact scores were off what was expected, in standard deviations; at least 1."""
        known = self._surprises[self._surprises.isfinite()]
        return max(1.0, float(known.square().mean().sqrt())) if len(known) else 1.0

    def observe_rows(self, row_indices: Tensor, scores: Tensor) -> None:
        """Add the exact scores (n,) of candidates."""
        stds = self.process.std(self._coordinates[row_indices], self._own[row_indices])
        expected = self.mean(row_indices)
        off = torch.where(stds.isfinite() & (stds > 0), (scores.double() - expected) / stds, math.nan)
        self._surprises = torch.cat([self._surprises, off])
        residuals = scores.double() - self.predicted[row_indices]
        self.process.observe(self._coordinates[row_indices], residuals, self._own[row_indices])

    def mean(self, row_indices: Tensor | slice = slice(None)) -> Tensor:
        """Return the posterior mean of candidates' scores, of all by default, (n,), float64."""
        coordinates = self._coordinates[row_indices]
        return self.predicted[row_indices] + (coordinates @ self.process.mean().to(coordinates.dtype)).double()

    def std(self) -> Tensor:
        """Return the posterior standard deviation of every candidate's score, (n,), float64.

        It is larger by what reading this query's rows has shown to be necessary.
        """
        return self.process.std(self._coordinates, self._own) * self.surprise
