"""Gaussian process over the rows' scores of one query: exact scores of some rows improve the estimates of the others.

A gradient predictor gives coarse scores of all rows, each with an error. The covariance of these errors between rows
is known from the training set: each of its rows served as a query once, and the errors (rows as queries, rows) have an
empirical covariance. With that, the posterior mean of all scores given a few exact ones is the solution of a linear
system of their number (Gaussian process regression, or kriging: Rasmussen and Williams 2006, eq. 2.25-2.26).
"""

import torch
from torch import Tensor


__all__ = ["GaussianProcess", "error_covariance"]

_NUGGET = 1e-3  # noise relative to the mean variance of observations: rounding of row codes and of the covariance


def error_covariance(errors: Tensor) -> Tensor:
    """Return the covariance (rows, rows) of errors over queries, scaled to a mean variance of 1; float16.

    Args:
        errors (`Tensor`): (rows, rows), row i as a query, row j as the scored row. The diagonal is left out: its
            entries are the largest, and no query is a training row.
    """
    errors = errors.double().clone().fill_diagonal_(0.0)
    covariance = errors.T @ errors
    return (covariance / covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)).half()


class GaussianProcess:
    """Posterior over the scores of one query, given exact scores of rows or of linear combinations of rows.

    Args:
        prior (`Tensor`): (rows,) mean before any observation.
        covariance (`Tensor`): (rows, rows), see `error_covariance`; its scale does not matter.
    """

    def __init__(self, prior: Tensor, covariance: Tensor):
        self.prior, self._covariance = prior.double(), covariance
        self._weights = torch.zeros(len(prior), 0, dtype=torch.float64)
        self._projected = self._weights.clone()  # covariance times weights
        self._residuals = torch.zeros(0, dtype=torch.float64)

    @property
    def observations(self) -> int:
        """Number of observations so far."""
        return len(self._residuals)

    def observe_rows(self, row_indices: Tensor, scores: Tensor) -> None:
        """Add the exact scores (n,) of rows."""
        weights = torch.zeros(len(self.prior), len(row_indices), dtype=torch.float64)
        weights[row_indices, torch.arange(len(row_indices))] = 1.0
        projected = self._covariance[:, row_indices].double()
        self._add(weights, projected, scores.double() - self.prior[row_indices])

    def observe_combinations(self, weights: Tensor, scores: Tensor) -> None:
        """Add the exact scores (n,) of linear combinations of rows with these weights (rows, n)."""
        projected = (self._covariance.float() @ weights.float()).double()
        self._add(weights.double(), projected, scores.double() - weights.double().T @ self.prior)

    def mean(self) -> Tensor:
        """Return the posterior mean of every row's score: (rows,), float64."""
        factor = self._factor()
        if factor is None:
            return self.prior.clone()
        return self.prior + self._projected @ torch.cholesky_solve(self._residuals[:, None], factor)[:, 0]

    def std(self) -> Tensor:
        """Return the posterior standard deviation of every row's score: (rows,), float64.

        Infinite without observations. The covariance is known up to a scale, which is the query's own and follows from
        the residuals.
        """
        factor = self._factor()
        if factor is None:
            return torch.full_like(self.prior, float("inf"))
        columns = torch.cat([self._residuals[:, None], self._projected.T], 1)
        solved = torch.linalg.solve_triangular(factor, columns, upper=False)
        scale = solved[:, 0].square().mean()
        variance = self._covariance.diagonal().double() - solved[:, 1:].square().sum(0)
        return (scale * variance.clamp(min=0.0)).sqrt()

    def _add(self, weights: Tensor, projected: Tensor, residuals: Tensor) -> None:
        self._weights = torch.cat([self._weights, weights], 1)
        self._projected = torch.cat([self._projected, projected], 1)
        self._residuals = torch.cat([self._residuals, residuals])

    def _factor(self) -> Tensor | None:
        """Return the Cholesky factor of the observations' covariance; None if that is empty or zero."""
        gram = self._weights.T @ self._projected
        if not float(gram.diagonal().sum()) > 0:
            return None
        nugget = _NUGGET * gram.diagonal().mean()
        return torch.linalg.cholesky_ex(gram + nugget * torch.eye(len(gram), dtype=torch.float64))[0]
