"""The processes that share the passes: rows are split over them, and so are the columns of every large matrix.

A rank computes the gradients of its own rows, and the ranks exchange them, so that each ends up with all rows of its
own columns, the parameters that it is in charge of. All that mixes columns is then a sum over ranks: Gram matrices,
products with the curvature's samples, norms, scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AttributionError


FAILED = -2  # in place of a row's position: its rank has failed


class Ranks:
    """A process among those of a run; by itself where there are no others, and then every method gives back its input.

    All methods but `columns` are collective: every rank calls them, in the same order. Tensors live on the CPU.

    Args:
        group (`ProcessGroup`, *optional*): a group over gloo, which all ranks made together.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def of_run(cls) -> "Ranks":
        """Those of the running job; collective. A group of its own, because matrices are on the CPU whatever the
        gradients of training are reduced over, and because passes take longer than a step may.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timedelta(days=1)))

    def columns(self, size: int) -> slice:
        """This rank's part of range(size)."""
        return slice(self.rank * size // self.size, (self.rank + 1) * size // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def first(self, *tensors: Tensor) -> None:
        """Make these what they are on rank 0: nothing that branches may differ in its last digit between ranks."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def objects(self, item: Any) -> list[Any]:
        """What every rank gave, in the order of ranks."""
        if self.size == 1:
            return [item]
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, item, group=self.group)
        return everything

    def exchange(self, places: Tensor, block: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """From some rows of all columns to all ranks' rows of this rank's columns.

        Args:
            places (`Tensor`): (rows,) where each row belongs, at most `most` of them; may be empty. A rank that has
                failed gives a negative one, and then all fail.
            block (`Tensor`): (rows, P).

        Returns:
            places (all rows,) and (all rows, own columns).

        Raises:
            AttributionError: another rank failed.
        """
        if self.size == 1:
            return places, block
        widths = [self._width(block.shape[1], rank) for rank in range(self.size)]
        filled = torch.full((most,), -1)
        filled[: len(places)] = places
        everyone = [torch.empty_like(filled) for _ in range(self.size)]
        dist.all_gather(everyone, filled, group=self.group)
        for rank, part in enumerate(everyone):
            if int(part[0]) == FAILED:
                raise AttributionError(f"rank {rank} failed in the passes; what it printed says why")
        counts = [int((part >= 0).sum()) for part in everyone]
        received = block.new_empty(sum(counts) * widths[self.rank])
        sent = torch.cat([part.reshape(-1) for part in block.split(widths, dim=1)])
        dist.all_to_all_single(
            received, sent, [n * widths[self.rank] for n in counts], [len(block) * w for w in widths], group=self.group
        )
        own = torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
        return own, received.view(-1, widths[self.rank])

    def fail(self, most: int) -> None:
        """Take part in an exchange by telling the others that this rank has failed."""
        everyone = [torch.zeros(most, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(everyone, torch.full((most,), FAILED), group=self.group)

    def spread(self, part: Tensor, size: int) -> Tensor:
        """(n, P) on every rank from every rank's (n, own columns)."""
        if self.size == 1:
            return part
        result = part.new_zeros(len(part), size)
        result[:, self.columns(size)] = part
        return self.total(result)

    def whole(self, part: Tensor, size: int) -> Tensor:
        """(n, P) on rank 0 from every rank's (n, own columns); on the others, nothing: (n, 0)."""
        if self.size == 1:
            return part
        widths = [self._width(size, rank) for rank in range(self.size)]
        result = part.new_empty(len(part), size if self.rank == 0 else 0)
        for line in range(len(part)):  # one line at a time: the whole is held once, not twice
            padded = part.new_zeros(max(widths))
            padded[: part.shape[1]] = part[line]
            gathered = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
            dist.gather(padded, gathered, dist.get_global_rank(self.group, 0), group=self.group)
            if gathered is not None:
                torch.cat([piece[:width] for piece, width in zip(gathered, widths, strict=True)], out=result[line])
        return result

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What fails on one rank fails on all of them, instead of leaving the others to wait for it.

        Raises:
            AttributionError: on the ranks that did not fail themselves.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            said = self.objects(None if error is None else str(error))
            if error is None and any(said):
                rank, message = next((rank, text) for rank, text in enumerate(said) if text)
                raise AttributionError(f"rank {rank}: {message}")
        if error is not None:
            raise error

    def _width(self, size: int, rank: int) -> int:
        return (rank + 1) * size // self.size - rank * size // self.size


SINGLE_PROCESS = Ranks()
