"""Functions of the preconditioned Gauss-Newton matrix, which is never formed.

With Z (M, P) the curvature samples times sqrt(D), H~ = Z^T Z + w I has at most M directions of its own. The Gram
matrix Z Z^T = U L U^T is M x M, and any function f acts as

    f(H~) x = f(w) x + Z^T U (f(L + w) - f(w)) / L U^T Z x .

Directions that no sample saw have no measured curvature and keep f(w): they stay plain gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NumericalError
from .storage import blocks


_WIDTH = 1 << 16  # columns of Z in flight; bounds memory when Z is mapped from disk


class Curvature:
    """H~ of one segment.

    Args:
        factor (`Tensor`): Z, (M, P); M may be 0 (no curvature).
        weight_decay (`float`): w, decoupled decay in units of the learning rate.
    """

    def __init__(self, factor: Tensor, weight_decay: float = 0.0):
        self.factor, self.weight_decay = factor, weight_decay
        samples, size = factor.shape
        gram = torch.zeros(samples, samples, dtype=torch.float64)
        for columns in blocks(size, _WIDTH):
            block = factor[:, columns]
            gram += (block @ block.T).double()
        if not bool(torch.isfinite(gram).all()):
            raise NumericalError("the curvature samples are not finite: the model's loss is NaN or infinite")
        values, vectors = torch.linalg.eigh(gram)
        kept = values > values.max().clamp(min=0) * torch.finfo(factor.dtype).eps if samples else values > 0
        self.values, self.vectors = values[kept], vectors[:, kept]

    def apply(self, function: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        """f(H~) applied to each row of `vectors` (n, P); returns (n, P)."""
        floor = function(torch.tensor([self.weight_decay], dtype=torch.float64))
        gain = (function(self.values + self.weight_decay) - floor) / self.values
        seen = torch.zeros(vectors.shape[0], self.factor.shape[0], dtype=torch.float64)
        columns = blocks(vectors.shape[1], _WIDTH)
        for block in columns:
            seen += (vectors[:, block] @ self.factor[:, block].T).double()
        mixed = (((seen @ self.vectors) * gain) @ self.vectors.T).to(vectors.dtype)
        result = vectors * floor.to(vectors.dtype)
        for block in columns:
            result[:, block] += mixed @ self.factor[:, block]
        return result
