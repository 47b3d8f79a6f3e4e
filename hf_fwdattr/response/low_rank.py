"""The low-rank basis: k directions that best keep what queries can see of the responses.

G (m, P) are gradients of sample rows at the end of training, standing in for queries, and R (m, P) their responses, so
G R^T holds the scores of rows against rows. From its singular value decomposition A S B^T come the directions B_k^T R,
along which a query is read, and the adjoint basis S_k^{-1} A_k^T G, which turns a response into coordinates. Of all
factorisations into k directions this one keeps most of the squared scores (Eckart and Young 1936).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError
from .distributed import SINGLE_PROCESS, Ranks
from .storage import blocks


__all__ = ["LowRankBasis", "combine", "explained_variance", "factorize", "inner_products"]

_WIDTH = 1 << 16  # columns held at a time; bounds memory when matrices are mapped from disk


@dataclass
class LowRankBasis:
    """A factorisation r_i ~ sum_j c_ij u_j.

    Attributes:
        directions (`Tensor`): (k, P), the u_j, of equal norm in the preconditioned metric.
        adjoint_basis (`Tensor`): (k, P), the a_j with c_ij = <a_j, r_i>.
        coordinates (`Tensor`): (m, k) of the sample rows.
        explained_variance (`float`): share of the held-out rows' score variance that k directions explain, 0 to 1.
        scores (`Tensor`): (m, m) G R^T, scores of sample rows as queries, float64.
    """

    directions: Tensor
    adjoint_basis: Tensor
    coordinates: Tensor
    explained_variance: float
    scores: Tensor


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
) -> LowRankBasis:
    """Return the best basis of k directions for the sample rows.

    Args:
        gradients (`Tensor`): G, (m, P).
        responses (`Tensor`): R, (m, P).
        diagonal (`Tensor`): (P,) D; directions have norm one in the metric 1 / D.
        count_or_variance (`int` or `float`): k, or the explained variance to reach (a float below 1).
        seed (`int`): of the split into fitted and held-out sample rows.
        ranks (`Ranks`, *optional*): processes that share the P columns of the arguments and of the result.

    Raises:
        NumericalError: scores that are not finite, or all zero.
    """
    scores = ranks.total(inner_products(gradients, responses))
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError(
            "the scores of the training rows are not finite: the model's loss is NaN or infinite. Check the run"
        )
    explained = explained_variance(scores, seed)
    ranks.broadcast(explained)
    if isinstance(count_or_variance, float):
        count_or_variance = int((explained < count_or_variance).sum())
    left, values, right = (part.contiguous() for part in torch.linalg.svd(scores))
    ranks.broadcast(left, values, right)
    nonzero = int((values > values[0] * 1e-10).sum()) if values[0] > 0 else 0
    if nonzero == 0:
        raise NumericalError("every response is zero: no row was trained on, or no tracked parameter was trained")
    k = max(1, min(count_or_variance, nonzero))
    combined = combine(right[:k], responses)
    squares = ranks.total((combined.double().square() / diagonal.double()).sum(1))
    norms = squares.sqrt().clamp(min=torch.finfo(combined.dtype).tiny)
    adjoint_basis = combine((left[:, :k] / values[:k]).T * norms[:, None], gradients)
    combined /= norms[:, None].to(combined.dtype)
    variance = float(explained[min(k, len(explained) - 1)])
    return LowRankBasis(combined, adjoint_basis, right[:k].T * norms, variance, scores)
