"""Coordinates of a bank's rows as they are stored, held for queries: one byte each in a large bank."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import ResponseBank
from .ranking import source_coordinates


__all__ = ["HeldRows"]

_BLOCK = 1 << 20  # coordinates that are read together, so that they stay in the processor's cache


class HeldRows:
    """Coordinates and sources of all rows, read when they are first asked for.

    Args:
        bank (`ResponseBank`): a bank that identifies rows.
    """

    def __init__(self, bank: ResponseBank):
        self.bank = bank

    def blocks(self) -> Iterator[Tensor]:
        """Yield coordinates of all rows in order, (n, k) in float32."""
        for stored, scales in self._shards:
            width = max(1, _BLOCK // max(stored.shape[1], 1))
            for start in range(0, len(stored), width):
                yield self._dense(stored[start : start + width], scales[start : start + width])

    def coordinates(self, row_indices: Tensor) -> Tensor:
        """Return coordinates (n, k) of rows in float32."""
        result, first = torch.zeros(len(row_indices), self.bank.manifest.directions), 0
        for stored, scales in self._shards:
            inside = ((row_indices >= first) & (row_indices < first + len(stored))).nonzero().flatten()
            lines = row_indices[inside] - first
            if self.bank.manifest.directions_are_rows:
                result[inside, row_indices[inside]] = stored[lines, 0].float()
            else:
                result[inside] = self._dense(stored[lines], scales[lines] if len(scales) else scales)
            first += len(stored)
        return result

    def _dense(self, stored: Tensor, scales: Tensor) -> Tensor:
        values = stored.float()
        if len(scales):
            values *= self._direction_scales
            values *= scales[:, None]
        return values

    @cached_property
    def _direction_scales(self) -> Tensor:
        return torch.tensor(self.bank.manifest.coordinate_scales)

    @cached_property
    def _shards(self) -> list[tuple[Tensor, Tensor]]:
        """Coordinates (n, k) of each shard as stored, and their scales (n,), none where they are floats."""
        return list(self.bank.stored_coordinates())

    @cached_property
    def outside(self) -> Tensor:
        """(rows,) norms of what is outside the directions."""
        return self.bank.outside()

    @cached_property
    def sources(self) -> Tensor:
        """(rows,) index of each row's source, -1 for none."""
        return torch.cat([sources.clone() for _, sources, _ in self.bank.coordinates(checked=False)])

    @cached_property
    def source_coordinates(self) -> Tensor:
        """(sources, k) sums of their rows' coordinates, float64."""
        return source_coordinates(self.bank.coordinates(), len(self.bank.manifest.sources))
