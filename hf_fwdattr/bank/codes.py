"""Rows' own responses in one byte a number, so that a bank can keep them and a query can read along them.

Each row is cut into stretches of `WIDTH` numbers; a stretch is stored as whole multiples of its largest magnitude
over 127. A number is therefore off by at most half such a step, and a score by at most the sum over stretches of half
a step times the query's absolute derivatives there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


WIDTH = 128
_CHUNK = 1 << 26  # numbers that are unpacked together


@dataclass
class RowCodes:
    """A matrix (rows, P) in 8 bits.

    Attributes:
        values (`Tensor`): (rows, P), int8.
        steps (`Tensor`): (rows, stretches), float32; a number is its value times the step of its stretch.
    """

    values: Tensor
    steps: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "RowCodes":
        """The nearest such matrix; `matrix` may be mapped from disk and is read by blocks of rows."""
        rows, size = matrix.shape
        result = cls(torch.empty(rows, size, dtype=torch.int8), torch.empty(rows, group_count(size)))
        width = max(1, _CHUNK // max(size, 1))
        for start in range(0, rows, width):
            block = _cut(matrix[start : start + width].float())
            steps = block.abs().amax(-1) / 127
            values = (block / steps.clamp(min=torch.finfo(steps.dtype).tiny).unsqueeze(-1)).round()
            result.values[start : start + width] = values.flatten(1)[:, :size].to(torch.int8)
            result.steps[start : start + width] = steps
        return result

    def __len__(self) -> int:
        return len(self.values)

    def decode(self) -> Tensor:
        """(rows, P), float32."""
        return (_cut(self.values.float()) * self.steps.unsqueeze(-1)).flatten(1)[:, : self.values.shape[1]]

    def products(self, vectors: Tensor) -> Tensor:
        """(queries, rows), float64: inner products with vectors (queries, P), by blocks of rows."""
        width = max(1, _CHUNK // max(self.values.shape[1], 1))
        result = torch.zeros(len(vectors), len(self), dtype=torch.float64)
        for at in range(0, len(self), width):
            block = RowCodes(self.values[at : at + width], self.steps[at : at + width]).decode()
            result[:, at : at + width] = (vectors.float() @ block.T).double()
        return result

    def bound(self, vectors: Tensor) -> Tensor:
        """(queries, rows): how far `products` may be from those of the matrix before it was quantised."""
        return _cut(vectors.double().abs()).sum(-1) @ (self.steps.double() / 2).T


def group_count(size: int) -> int:
    """Stretches of a row of this many numbers."""
    return -(-size // WIDTH)


def _cut(matrix: Tensor) -> Tensor:
    """(rows, stretches, WIDTH), the last one filled up with zeros."""
    filled = torch.nn.functional.pad(matrix, (0, group_count(matrix.shape[1]) * WIDTH - matrix.shape[1]))
    return filled.unflatten(1, (-1, WIDTH))
