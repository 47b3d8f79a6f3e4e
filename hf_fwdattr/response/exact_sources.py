"""Sources whose responses are summed exactly, outside the low-rank basis."""

from dataclasses import dataclass

import torch
from torch import Tensor


__all__ = ["ExactSources"]


@dataclass(frozen=True)
class ExactSources:
    """Sources that get an exact response.

    Attributes:
        count (`int`): number of sources; 0 for none.
        source_of_row (`Tensor`): (rows,) index of each row's source, -1 for none.
    """

    count: int
    source_of_row: Tensor

    @classmethod
    def none(cls, rows: int) -> "ExactSources":
        """No source among so many rows."""
        return cls(0, torch.full((rows,), -1))

    def add(self, sums: Tensor, row_indices: Tensor, vectors: Tensor) -> None:
        """Add the rows' `vectors` (n, P) to the sums (count, P) of their sources, in place."""
        if self.count:
            sources = self.source_of_row[row_indices]
            sums.index_add_(0, sources[sources >= 0], vectors[sources >= 0])
