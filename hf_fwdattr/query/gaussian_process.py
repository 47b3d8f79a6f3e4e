"""What some scores that were read say about those that were not.

A first look predicts a query's score for every row and is off by something. How these errors go together from row to
row is known from the training set: each of its rows was a query once, and its errors (rows as queries, rows) give a
covariance. Given that, the best linear prediction of all scores from a few exact ones is a linear system of their
number (kriging; Gaussian process regression: Rasmussen and Williams 2006, eq. 2.25-2.26, with an empirical kernel).
"""

import torch
from torch import Tensor


_NUGGET = 1e-3  # of the mean variance of what was read: rounding of 8-bit responses and of the kernel itself


def error_covariance(errors: Tensor) -> Tensor:
    """Covariance (rows, rows) of errors over queries, scaled to a mean variance of 1; float16.

    Args:
        errors (`Tensor`): (rows, rows), row i as a query, row j as what is scored. How a row sees itself is left out:
            no query is the row, and those entries are the largest.
    """
    errors = errors.double().clone().fill_diagonal_(0.0)
    kernel = errors.T @ errors
    return (kernel / kernel.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)).half()


class GaussianProcess:
    """Scores of one query: expected ones for all rows, given those that were read.

    Args:
        prior (`Tensor`): (rows,) what is expected when nothing was read.
        kernel (`Tensor`): (rows, rows), see `error_covariance`; its scale does not matter.
    """

    def __init__(self, prior: Tensor, kernel: Tensor):
        self.prior, self._kernel = prior.double(), kernel
        self._weights = torch.zeros(len(prior), 0, dtype=torch.float64)
        self._shared = self._weights.clone()  # kernel times weights
        self._off = torch.zeros(0, dtype=torch.float64)

    def rows(self, places: Tensor, scores: Tensor) -> None:
        """Scores (n,) of the rows at these positions were read."""
        weights = torch.zeros(len(self.prior), len(places), dtype=torch.float64)
        weights[places, torch.arange(len(places))] = 1.0
        self._add(weights, self._kernel[:, places].double(), scores.double() - self.prior[places])

    def mixtures(self, weights: Tensor, off: Tensor) -> None:
        """Along sums of responses with weights (rows, n), readouts were off by `off` (n,) from what was expected."""
        self._add(weights.double(), (self._kernel.float() @ weights.float()).double(), off.double())

    def _add(self, weights: Tensor, shared: Tensor, off: Tensor) -> None:
        self._weights = torch.cat([self._weights, weights], 1)
        self._shared = torch.cat([self._shared, shared], 1)
        self._off = torch.cat([self._off, off])

    def _factor(self) -> Tensor | None:
        """Of the covariance of what was read; None if that is nothing, or nothing that could have been off."""
        gram = self._weights.T @ self._shared
        if not float(gram.diagonal().sum()) > 0:
            return None
        nugget = _NUGGET * gram.diagonal().mean()
        return torch.linalg.cholesky_ex(gram + nugget * torch.eye(len(gram), dtype=torch.float64))[0]

    def expected(self) -> Tensor:
        """(rows,) scores, float64."""
        factor = self._factor()
        if factor is None:
            return self.prior.clone()
        return self.prior + self._shared @ torch.cholesky_solve(self._off[:, None], factor)[:, 0]

    def deviations(self) -> Tensor:
        """(rows,) by how much, typically, a score is off from what is expected, float64.

        The kernel says this up to a scale, which is this query's own: how far off what was read has been.
        """
        factor = self._factor()
        if factor is None:
            return torch.full_like(self.prior, float("inf"))
        solved = torch.linalg.solve_triangular(factor, torch.cat([self._off[:, None], self._shared.T], 1), upper=False)
        scale = solved[:, 0].square().mean()
        left = self._kernel.diagonal().double() - solved[:, 1:].square().sum(0)
        return (scale * left.clamp(min=0.0)).sqrt()
