"""k directions that keep best what queries can see of the responses.

G (m, P) are gradients of sample rows at the end of training, standing in for queries, and R (m, P) their responses, so
G R^T holds the scores of rows against rows. From its singular value decomposition A S B^T come the directions B_k^T R,
along which a query is read, and dual directions S_k^{-1} A_k^T G, with which a response is turned into coordinates. Of all
factorisations of rank k this one keeps most of the squared scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError
from .distributed import SINGLE_PROCESS, Ranks
from .storage import blocks


_WIDTH = 1 << 16


@dataclass
class LowRankBasis:
    """A factorisation r_i ~ sum_j c_ij u_j.

    Attributes:
        directions (`Tensor`): (k, P), the u_j, of equal norm in the preconditioned metric.
        duals (`Tensor`): (k, P); c_ij = <dual_j, r_i>.
        coordinates (`Tensor`): (m, k) of the sample rows.
        kept (`float`): share of the variance of scores of held-out rows that k directions keep, 0 to 1.
        scores (`Tensor`): (m, m) G R^T, sample rows as queries against sample rows, float64.
    """

    directions: Tensor
    adjoint_basis: Tensor
    coordinates: Tensor
    kept: float
    scores: Tensor


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """left right^T (n, m) in float64, by blocks of columns, so that either may be mapped from disk."""
    result = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64)
    for columns in blocks(left.shape[1], _WIDTH):
        result += (left[:, columns] @ right[:, columns].T).double()
    return result


def combine(weights: Tensor, vectors: Tensor) -> Tensor:
    """weights (k, m) times vectors (m, P), by blocks of columns, in the vectors' dtype."""
    result = torch.empty(weights.shape[0], vectors.shape[1], dtype=vectors.dtype)
    weights = weights.to(vectors.dtype)
    for columns in blocks(vectors.shape[1], _WIDTH):
        result[:, columns] = weights @ vectors[:, columns]
    return result


def explained_variance(scores: Tensor, seed: int = 0, share: float = 0.2) -> Tensor:
    """For each k, the share of held-out score variance that a basis of the other queries keeps; (m + 1,), from k = 0.

    Args:
        scores (`Tensor`): (m, m) of sample rows as queries against sample rows.
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
    rank_or_variance: int | float,
    seed: int = 0,
    ranks: Ranks = SINGLE_PROCESS,
) -> LowRankBasis:
    """The best rank-k basis of sample rows.

    Args:
        gradients (`Tensor`): G, (m, P).
        responses (`Tensor`): R, (m, P).
        diagonal (`Tensor`): (P,) the metric of the directions' norm.
        rank_or_variance (`int` or `float`): k, or the kept variance to reach (a float below 1).
        seed (`int`): of the split into fitted and held-out sample rows.
        ranks (`Ranks`, *optional*): where several processes share the P columns of all of these, and of the result.

    Raises:
        NumericalError: scores that are not finite, or all zero.
    """
    scores = ranks.total(inner_products(gradients, responses))
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError("the scores of the training rows are not finite; was the training loss NaN?")
    kept = explained_variance(scores, seed)
    ranks.first(kept)
    if isinstance(rank_or_variance, float):
        rank_or_variance = int((kept < rank_or_variance).sum())
    left, values, right = (part.contiguous() for part in torch.linalg.svd(scores))
    ranks.first(left, values, right)
    rank = int((values > values[0] * 1e-10).sum()) if values[0] > 0 else 0
    if rank == 0:
        raise NumericalError("every response is zero: no row was trained on, or nothing that responds was trained")
    k = max(1, min(rank_or_variance, rank))
    combined = combine(right[:k], responses)
    squares = ranks.total((combined.double().square() / diagonal.double()).sum(1))
    norms = squares.sqrt().clamp(min=torch.finfo(combined.dtype).tiny)
    adjoint_basis = combine((left[:, :k] / values[:k]).T * norms[:, None], gradients)
    combined /= norms[:, None].to(combined.dtype)
    return LowRankBasis(combined, adjoint_basis, right[:k].T * norms, float(kept[min(k, len(kept) - 1)]), scores)
