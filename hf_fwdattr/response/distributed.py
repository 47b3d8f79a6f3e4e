"""Ranks: the processes that share the passes, the training rows, and the columns of every large matrix.

A rank computes the gradients of its own rows, and the ranks exchange them, so that each holds all rows of its own
columns, a part of the tracked parameters. Whatever mixes columns is then a sum over ranks: Gram matrices, products
with the curvature's samples, norms, scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AttributionError


__all__ = ["SINGLE_PROCESS", "Ranks"]

_FAILED = -2  # in place of a row's position: its rank has failed


class Ranks:
    """One process among those of a run; with a single process every method returns its input.

    All methods but `columns` are collective: every rank calls them, in the same order. Tensors are on the CPU.

    Args:
        group (`ProcessGroup`, *optional*): a gloo group that all ranks created together.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def of_run(cls) -> "Ranks":
        """Return the ranks of the running job; collective.

        They get a group of their own, because matrices are on the CPU whatever training's gradients are reduced over,
        and because passes take longer than a training step may.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timedelta(days=1)))

    def columns(self, size: int) -> slice:
        """Return this rank's part of range(size)."""
        return slice(self.rank * size // self.size, (self.rank + 1) * size // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, *tensors: Tensor) -> None:
        """Overwrite the tensors with those of rank 0: no value that branches may differ between ranks by rounding."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def objects(self, item: Any) -> list[Any]:
        """Return the items of all ranks, in their order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def exchange(self, positions: Tensor, block: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Exchange this rank's rows in all columns for all ranks' rows in this rank's columns.

        Args:
            positions (`Tensor`): (rows,) position of each row, at most `most` of them; may be empty.
            block (`Tensor`): (rows, P).
            most (`int`): largest number of rows that any rank gives.

        Returns:
            positions (all rows,) and block (all rows, own columns).

        Raises:
            AttributionError: another rank called `report_failure`.
        """
        if self.size == 1:
            return positions, block
        widths = [self._width(block.shape[1], rank) for rank in range(self.size)]
        filled = torch.full((most,), -1)
        filled[: len(positions)] = positions
        parts = [torch.empty_like(filled) for _ in range(self.size)]
        dist.all_gather(parts, filled, group=self.group)
        for rank, part in enumerate(parts):
            if int(part[0]) == _FAILED:
                raise AttributionError(f"rank {rank} failed in the passes. Its own error says why")
        counts = [int((part >= 0).sum()) for part in parts]
        received = block.new_empty(sum(counts) * widths[self.rank])
        sent = torch.cat([part.reshape(-1) for part in block.split(widths, dim=1)])
        dist.all_to_all_single(
            received, sent, [n * widths[self.rank] for n in counts], [len(block) * w for w in widths], group=self.group
        )
        gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return gathered, received.view(-1, widths[self.rank])

    def report_failure(self, most: int) -> None:
        """Take part in an exchange, and make it fail on the other ranks."""
        parts = [torch.zeros(most, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(parts, torch.full((most,), _FAILED), group=self.group)

    def spread_columns(self, part: Tensor, size: int) -> Tensor:
        """Return (n, P) on every rank from every rank's (n, own columns)."""
        if self.size == 1:
            return part
        result = part.new_zeros(len(part), size)
        result[:, self.columns(size)] = part
        return self.total(result)

    def share_rows(self, part: Tensor, size: int) -> Tensor:
        """Return this rank's share of the n rows in all columns, from every rank's (n, own columns).

        Shares are contiguous and in the ranks' order, as `columns` would cut range(n).
        """
        if self.size == 1:
            return part
        counts = [self._width(len(part), rank) for rank in range(self.size)]
        widths = [self._width(size, rank) for rank in range(self.size)]
        own = counts[self.rank]
        received = part.new_empty(own * size)
        sizes = [own * width for width in widths], [count * part.shape[1] for count in counts]
        dist.all_to_all_single(received, part.contiguous().view(-1), *sizes, group=self.group)
        pieces = received.split(sizes[0])
        return torch.cat([piece.view(own, width) for piece, width in zip(pieces, widths, strict=True)], 1)

    def gather_rows(self, own: Tensor, rows: int) -> Tensor:
        """Return all `rows` rows on rank 0, and none on the others, from every rank's share as of `share_rows`."""
        if self.size == 1:
            return own
        counts = [self._width(rows, rank) for rank in range(self.size)]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in counts] if self.rank == 0 else None
        dist.gather(padded, gathered, dist.get_global_rank(self.group, 0), group=self.group)
        if gathered is None:
            return own[:0]
        return torch.cat([piece[:count] for piece, count in zip(gathered, counts, strict=True)])

    def gather_columns(self, part: Tensor, size: int) -> Tensor:
        """Return (n, P) on rank 0 and (n, 0) on the others, from every rank's (n, own columns)."""
        if self.size == 1:
            return part
        widths = [self._width(size, rank) for rank in range(self.size)]
        result = part.new_empty(len(part), size if self.rank == 0 else 0)
        for line in range(len(part)):  # one line at a time, so that the result is held once, not twice
            padded = part.new_zeros(max(widths))
            padded[: part.shape[1]] = part[line]
            gathered = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
            dist.gather(padded, gathered, dist.get_global_rank(self.group, 0), group=self.group)
            if gathered is not None:
                torch.cat([piece[:width] for piece, width in zip(gathered, widths, strict=True)], out=result[line])
        return result

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise an error of one rank on all of them, instead of leaving the others to wait for it.

        Raises:
            AttributionError: on the ranks that did not fail themselves, with the error's text.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            messages = self.objects(None if error is None else str(error))
            if error is None and any(messages):
                rank, message = next((rank, text) for rank, text in enumerate(messages) if text)
                raise AttributionError(f"rank {rank}: {message}")
        if error is not None:
            raise error

    def _width(self, size: int, rank: int) -> int:
        return (rank + 1) * size // self.size - rank * size // self.size


SINGLE_PROCESS = Ranks()
