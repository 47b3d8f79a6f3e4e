"""Curvature: functions of the preconditioned Gauss-Newton matrix, which is never formed.

With Z (M, P) the curvature samples times sqrt(D), H~ = Z^T Z + w I has at most M directions of its own. The Gram
matrix Z Z^T = U L U^T is M x M, and any function f acts as

    f(H~) x = f(w) x + Z^T U (f(L + w) - f(w)) / L U^T Z x .

Vectors orthogonal to all samples have no measured curvature and keep f(w): they stay plain gradients.

Z has fewer rows than columns, so the eigenvalues of Z^T Z are too large in the subspace that the samples happen to
span. The samples themselves say by how much (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional
covariance matrices"): the shrinkage rho is the variance of the estimate over its distance from a multiple of the
identity, and the measured curvature is scaled by (1 - rho). The identity's own part, rho tr(H~) / P, is below a
hundredth of the horizon wherever it was measured, and is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NumericalError
from .distributed import SINGLE_PROCESS, Ranks
from .storage import blocks


__all__ = ["Curvature", "ledoit_wolf"]

Function = Callable[[Tensor], Tensor]
Term = tuple[Function, Tensor] | tuple[Function, Tensor, Tensor]
_WIDTH = 1 << 16  # columns of Z held at a time; bounds memory when Z is mapped from disk


class Curvature:
    """The preconditioned Gauss-Newton matrix H~ of one segment.

    Args:
        factor (`Tensor`): Z, (M, P); M may be 0 (no curvature).
        weight_decay (`float`): w, decoupled decay in units of the learning rate.
        sampled (`bool`): whether the rows of Z are random samples, whose eigenvalues are shrunk; otherwise Z^T Z is
            taken as it is.
        ranks (`Ranks`, *optional*): processes that share the columns of Z, and of the vectors it is applied to.

    Attributes:
        shrinkage (`float`): rho, between 0 and 1.
        values (`Tensor`): eigenvalues of Z^T Z, shrunk.

    Raises:
        NumericalError: a sample is not finite.
    """

    def __init__(
        self, factor: Tensor, weight_decay: float = 0.0, sampled: bool = False, ranks: Ranks = SINGLE_PROCESS
    ):
        self.factor, self.weight_decay, self.ranks = factor, weight_decay, ranks
        samples, size = factor.shape
        gram = torch.zeros(samples, samples, dtype=torch.float64)
        for columns in blocks(size, _WIDTH):
            block = factor[:, columns]
            gram += (block @ block.T).double()
        ranks.total(gram)
        if not bool(torch.isfinite(gram).all()):
            raise NumericalError(
                "the curvature samples are not finite: the model's loss is NaN or infinite. Check the run"
            )
        values, vectors = torch.linalg.eigh(gram)
        kept = values > values.max().clamp(min=0) * torch.finfo(factor.dtype).eps if samples else values > 0
        self.shrinkage = ledoit_wolf(gram, int(ranks.total(torch.tensor(size)))) if sampled else 0.0
        self._measured, self.vectors = values[kept], vectors[:, kept]
        self.values = self._measured * (1.0 - self.shrinkage)

    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        """Apply f(H~) to each of the vectors (n, P); return (n, P)."""
        return self.apply_sum((function, vectors))

    def apply_sum(self, *terms: Term) -> Tensor:
        """Return the sum of f(H~) x over terms (f, x) of one shape (n, P), with a single product by Z^T.

        A third item of a term, (m,), names the line of the result to which each of its vectors (m, P) is added; then f
        may return values for each of them, (m, values). The first term has none.
        """
        result = torch.zeros_like(terms[0][1])
        spectral = torch.zeros(len(result), len(self.values), dtype=torch.float64)
        columns = blocks(result.shape[1], _WIDTH)
        for function, vectors, *lines in terms:
            floor = function(torch.tensor([self.weight_decay], dtype=torch.float64))
            gain = (function(self.values + self.weight_decay) - floor) / self._measured
            products = torch.zeros(len(vectors), self.factor.shape[0], dtype=torch.float64)
            for block in columns:
                products += (vectors[:, block] @ self.factor[:, block].T).double()
            found = (self.ranks.total(products) @ self.vectors) * gain
            if lines:
                spectral.index_add_(0, lines[0], found)
                result.index_add_(0, lines[0], vectors * floor.to(vectors.dtype))
            else:
                spectral += found
                result.add_(vectors, alpha=float(floor))
        combination = (spectral @ self.vectors.T).to(result.dtype)
        for block in columns:
            result[:, block] += combination @ self.factor[:, block]
        return result


def ledoit_wolf(gram: Tensor, size: int) -> float:
    """Return rho of the estimate Z^T Z from M independent samples in `size` dimensions, given its Gram matrix (M, M).

    With z_m the rows of Z, M z_m z_m^T are M estimates of one matrix, and Z^T Z is their mean: their squared spread
    over M is sum |z_m|^4 - |Z^T Z|^2 / M, and the distance from a multiple of the identity is |Z^T Z|^2 - tr^2 / P.
    """
    samples = gram.shape[0]
    square = float(gram.square().sum())
    distance = square - float(gram.trace()) ** 2 / size
    if samples < 2 or distance <= 0.0:
        return 0.0
    spread = float(gram.diagonal().square().sum()) - square / samples
    return min(1.0, max(0.0, spread / distance))
