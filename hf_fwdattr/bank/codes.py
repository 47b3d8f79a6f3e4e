"""Row codes: a row's response in 8 bits a number, so that a bank can keep every row's.

Each row is cut into groups of `GROUP` numbers; a group is stored as whole multiples of its scale, its largest
magnitude over 127. A number is therefore off by at most half a scale, and a score by at most the sum over groups of
half the scale times the query's absolute derivatives there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schema import GROUP


__all__ = ["RowCodes", "group_count"]

_CHUNK = 1 << 26  # numbers that are decoded together


@dataclass
class RowCodes:
    """A matrix (rows, P) in 8 bits.

    Attributes:
        codes (`Tensor`): (rows, P), int8.
        scales (`Tensor`): (rows, groups), float32; a number is its code times the scale of its group.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "RowCodes":
        """Encode a matrix (rows, P), which may be mapped from disk and is read by blocks of rows."""
        rows, size = matrix.shape
        result = cls(torch.empty(rows, size, dtype=torch.int8), torch.empty(rows, group_count(size)))
        width = max(1, _CHUNK // max(size, 1))
        for start in range(0, rows, width):
            block = _grouped(matrix[start : start + width].float())
            scales = block.abs().amax(-1) / 127
            codes = (block / scales.clamp(min=torch.finfo(scales.dtype).tiny).unsqueeze(-1)).round()
            result.codes[start : start + width] = codes.flatten(1)[:, :size].to(torch.int8)
            result.scales[start : start + width] = scales
        return result

    def __len__(self) -> int:
        return len(self.codes)

    def decode(self) -> Tensor:
        """(rows, P), float32."""
        return (_grouped(self.codes.float()) * self.scales.unsqueeze(-1)).flatten(1)[:, : self.codes.shape[1]]

    def products(self, vectors: Tensor) -> Tensor:
        """(queries, rows), float64: inner products with vectors (queries, P), by blocks of rows."""
        width = max(1, _CHUNK // max(self.codes.shape[1], 1))
        result = torch.zeros(len(vectors), len(self), dtype=torch.float64)
        for at in range(0, len(self), width):
            block = RowCodes(self.codes[at : at + width], self.scales[at : at + width]).decode()
            result[:, at : at + width] = (vectors.float() @ block.T).double()
        return result

    def bound(self, vectors: Tensor) -> Tensor:
        """(queries, rows): the largest error of `products` against those of the matrix that was encoded."""
        return _grouped(vectors.double().abs()).sum(-1) @ (self.scales.double() / 2).T


def group_count(size: int) -> int:
    """Return the number of groups of a row of this many numbers."""
    return -(-size // GROUP)


def _grouped(matrix: Tensor) -> Tensor:
    """(rows, groups, GROUP), the last group filled up with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, group_count(matrix.shape[1]) * GROUP - matrix.shape[1]))
    return padded.unflatten(1, (-1, GROUP))
