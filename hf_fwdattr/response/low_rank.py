"""The low-rank basis: k directions that best keep what queries can see of the responses.

G (m, P) are gradients of sample rows at the end of training, standing in for queries, and R (m, P) their responses, so
G R^T holds the scores of rows against rows. From its singular value decomposition A S B^T come the directions B_k^T R,
along which a query is read, and the adjoint basis S_k^{-1} A_k^T G, which turns a response into coordinates. Of all
factorisations into k directions this one keeps most of the squared scores (Eckart and Young 1936).

Where gradients are predicted, the predictions and their errors E are the queries, one below the other and of equal
weight: directions then keep what a query shows and what remains to be read of it. Within their span the directions are
so turned that errors along them are uncorrelated, largest first: they are read in this order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError
from .distributed import SINGLE_PROCESS, Ranks
from .storage import blocks


__all__ = ["LowRankBasis", "SampleScores", "combine", "explained_variance", "factorize", "inner_products"]

_WIDTH = 1 << 16  # columns held at a time; bounds memory when matrices are mapped from disk
_FEW = 2  # times k: so few sample rows count themselves among their queries


@dataclass
class SampleScores:
    """Scores of sample rows as queries, and what a gradient predictor leaves of them; float64.

    Attributes:
        whole (`Tensor`): (m, m), row i as a query, row j as the scored row.
        errors (`Tensor`, *optional*): (m, m), `whole` less the predicted scores; None without a predictor.
    """

    whole: Tensor
    errors: Tensor | None = None

    @property
    def remaining(self) -> Tensor:
        """Scores that remain to be read, (m, m)."""
        return self.whole if self.errors is None else self.errors

    @property
    def kinds(self) -> list[Tensor]:
        """Scores of the queries that directions are found from: predictions and their errors, or rows themselves."""
        return [self.whole] if self.errors is None else [self.whole - self.errors, self.errors]

    def without_own(self) -> "SampleScores":
        """Return the scores without those of rows on themselves, the largest of all: no query is a training row."""
        errors = None if self.errors is None else self.errors.clone().fill_diagonal_(0.0)
        return SampleScores(self.whole.clone().fill_diagonal_(0.0), errors)


@dataclass
class LowRankBasis:
    """A factorisation r_i ~ sum_j c_ij u_j.

    Attributes:
        directions (`Tensor`): (k, P), the u_j, of equal norm in the preconditioned metric.
        adjoint_basis (`Tensor`): (k, P), the a_j with c_ij = <a_j, r_i>.
        coordinates (`Tensor`): (m, k) of the sample rows, float64.
        explained_variance (`float`): share of the held-out rows' score variance that k directions explain, 0 to 1.
        scores (`SampleScores`): of the sample rows.
        error_variances (`Tensor`): (k,) mean squares of what remains to be read along the directions, float64.
        outside_scores (`Tensor`): (2, m) mean squared scores over queries, for every sample row, that are outside the
            directions: of whole scores, and of what remains, as for queries that were left out; float64.
        derivative_square (`float`): mean over queries of the squared derivatives along all directions together.
    """

    directions: Tensor
    adjoint_basis: Tensor
    coordinates: Tensor
    explained_variance: float
    scores: SampleScores
    error_variances: Tensor
    outside_scores: Tensor
    derivative_square: float


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T (n, m) in float64, by blocks of columns, so that either may be mapped from disk."""
    result = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64)
    for columns in blocks(left.shape[1], _WIDTH):
        result += (left[:, columns] @ right[:, columns].T).double()
    return result


def combine(weights: Tensor, vectors: Tensor) -> Tensor:
    """Return weights (k, m) times vectors (m, P) in the vectors' dtype, by blocks of columns."""
    result = torch.empty(weights.shape[0], vectors.shape[1], dtype=vectors.dtype)
    weights = weights.to(vectors.dtype)
    for columns in blocks(vectors.shape[1], _WIDTH):
        result[:, columns] = weights @ vectors[:, columns]
    return result


def explained_variance(scores: Tensor, seed: int = 0, share: float = 0.2) -> Tensor:
    """Return the share of held-out score variance that k = 0, 1, ..., m directions of the other queries explain.

    Args:
        scores (`Tensor`): (m, m) scores of sample rows as queries.
        seed (`int`): of the split.
        share (`float`): part of the queries that is held out.

    Returns:
        (m + 1,), ascending from 0.
    """
    order = torch.randperm(scores.shape[0], generator=torch.Generator().manual_seed(seed))
    held = order[: max(1, round(share * scores.shape[0]))]
    fitted = order[len(held) :] if len(held) < scores.shape[0] else held
    _, _, right = torch.linalg.svd(scores[fitted], full_matrices=True)
    energy = (scores[held] @ right.T).square().sum(0)
    total = energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    return torch.cat([energy.new_zeros(1), energy.cumsum(0) / total]).clamp(max=1.0)


def factorize(
    gradients: Tensor,
    responses: Tensor,
    diagonal: Tensor,
    count_or_variance: int | float,
    seed: int = 0,
    ranks: Ranks = SINGLE_PROCESS,
    errors: Tensor | None = None,
) -> LowRankBasis:
    """Return the best basis of k directions for the sample rows.

    Args:
        gradients (`Tensor`): G, (m, P), of the log-likelihood.
        responses (`Tensor`): R, (m, P).
        diagonal (`Tensor`): (P,) D; directions have norm one in the metric 1 / D.
        count_or_variance (`int` or `float`): k, or the explained variance to reach (a float below 1).
        seed (`int`): of the split into fitted and held-out sample rows.
        ranks (`Ranks`, *optional*): processes that share the P columns of the arguments and of the result.
        errors (`Tensor`, *optional*): E, (m, P), the gradients less the predicted ones.

    Raises:
        NumericalError: scores that are not finite, or all zero.
    """
    scores = SampleScores(ranks.total(inner_products(gradients, responses)))
    if errors is not None:
        scores.errors = ranks.total(inner_products(errors, responses))
    if not bool(torch.isfinite(scores.whole).all() and torch.isfinite(scores.remaining).all()):
        raise NumericalError(
            "the scores of the training rows are not finite: the model's loss is NaN or infinite. Check the run"
        )
    explained = explained_variance(scores.whole, seed)
    ranks.broadcast(explained)
    if isinstance(count_or_variance, float):
        count_or_variance = int((explained < count_or_variance).sum())
    others = scores if len(responses) <= _FEW * count_or_variance else scores.without_own()
    weights, coefficients = _subspace(others, count_or_variance, ranks)  # (m, k) each; (queries, k) the second
    combined = combine(weights.T, responses)
    squares = ranks.total((combined.double().square() / diagonal.double()).sum(1))
    norms = squares.sqrt().clamp(min=torch.finfo(combined.dtype).tiny)
    on_gradients, on_errors = coefficients.split(len(responses)) if errors is not None else (coefficients, None)
    adjoint_basis = combine(on_gradients.T * norms[:, None], gradients)
    if errors is not None and on_errors is not None:  # a prediction is the gradient less its error
        adjoint_basis += combine((on_errors - on_gradients).T * norms[:, None], errors)
    combined /= norms[:, None].to(combined.dtype)
    coordinates = weights * norms
    whole, remaining = (part @ weights / norms for part in (others.whole, others.remaining))
    growth = _growth_for_new_queries(others, len(combined), seed, ranks)
    outside = [part - part @ weights @ weights.T for part in (others.whole, others.remaining)]
    return LowRankBasis(
        combined, adjoint_basis, coordinates, float(explained[min(len(combined), len(explained) - 1)]), scores,
        remaining.square().mean(0), torch.stack([part.square().mean(0) for part in outside]) * growth[:, None],
        float(whole.square().sum(1).mean()),
    )  # fmt: skip


def _growth_for_new_queries(scores: SampleScores, k: int, seed: int, ranks: Ranks) -> Tensor:
    """Return how much more of the scores of queries that were left out is outside k directions than of the others.

    Returns:
        (2,), at least 1: of whole scores, and of what remains.
    """
    count = len(scores.whole)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held, fitted = order[: count // 5], order[count // 5 :]
    if k >= len(fitted) or not len(held):
        return torch.ones(2, dtype=torch.float64)
    kinds = scores.kinds
    fit = torch.cat([kind[fitted] / kind.norm().clamp(min=torch.finfo(kind.dtype).tiny) for kind in kinds])
    vectors = torch.linalg.eigh(fit.T @ fit)[1][:, -k:]
    result = torch.ones(2, dtype=torch.float64)
    for at, kind in enumerate((scores.whole, scores.remaining)):
        outside = (kind - kind @ vectors @ vectors.T).square().sum(1)
        inside = outside[fitted].mean()
        if float(inside) > 0:
            result[at] = (outside[held].mean() / inside).clamp(min=1.0)
    ranks.broadcast(result)
    return result


def _subspace(scores: SampleScores, count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the weights of sample rows in the directions, and those of queries in the adjoint basis.

    Returns:
        (m, k) with orthonormal columns, turned so that what remains to be read is uncorrelated between directions and
        largest first; and (m or 2 m, k) whose product with the queries' scores gives coordinates.
    """
    kinds = scores.kinds
    scales = [1 / kind.norm().clamp(min=torch.finfo(kind.dtype).tiny) for kind in kinds]
    stacked = torch.cat([kind * scale for kind, scale in zip(kinds, scales, strict=True)])
    left, values, right = (part.contiguous() for part in torch.linalg.svd(stacked, full_matrices=False))
    ranks.broadcast(left, values, right)
    nonzero = int((values > values[0] * 1e-10).sum()) if values[0] > 0 else 0
    if nonzero == 0:
        raise NumericalError("every response is zero: no row was trained on, or no tracked parameter was trained")
    k = max(1, min(count, nonzero))
    remaining = scores.remaining @ right[:k].T
    _, turn = torch.linalg.eigh(remaining.T @ remaining)
    ranks.broadcast(turn := turn.flip(1).contiguous())
    coefficients = (left[:, :k] / values[:k]) @ turn
    for part, scale in zip(coefficients.split(len(scores.whole)), scales, strict=True):
        part *= scale
    return right[:k].T @ turn, coefficients
