"""Storage of large (rows, P) matrices: in memory while the budget lasts, then in memory maps on disk."""

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor


__all__ = ["Storage", "blocks", "rows_in_flight"]

_LEAST = 64 << 20  # bytes that the passes take in any case, however small the budget
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Storage:
    """An allocator of zero matrices within a memory budget; a context that removes its memory maps at its end.

    Args:
        budget (`int`): bytes that may be held in memory; matrices beyond it are mapped from disk.
        folder (`Path`, *optional*): where memory maps go; the system's temporary folder by default.
    """

    def __init__(self, budget: int, folder: Path | None = None):
        self.budget, self.parent = budget, folder
        self.held = 0
        self.spilled = 0
        self._folder: Path | None = None

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def zeros(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a zero matrix (rows, columns) on the CPU.

        Raises:
            OSError: neither memory nor disk has room for the matrix.
        """
        size = rows * columns * dtype.itemsize
        if self.held + size <= self.budget or size == 0:
            self.held += size
            return torch.zeros(rows, columns, dtype=dtype)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fwdattr-", dir=self.parent))
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise OSError(
                f"the passes need {size / 2**30:.1f} GiB of disk in {self._folder}, where {free / 2**30:.1f} GiB are "
                "free: raise memory_budget, lower curvature_samples, or track fewer parameters"
            )
        self.spilled += size
        path = self._folder / f"{self.spilled}.bin"
        with path.open("wb") as file:
            # A sparse file on a full disk would kill the process at some later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        return torch.from_numpy(np.memmap(path, _NUMPY[dtype], "r+", shape=(rows, columns)))


def blocks(size: int, width: int) -> list[slice]:
    """Return slices of at most `width` that cover range(size)."""
    return [slice(start, min(start + width, size)) for start in range(0, size, max(1, width))]


def rows_in_flight(budget: int, columns: int, dtype: torch.dtype) -> int:
    """Return how many rows of so many columns fit into a sixteenth of the budget; at least one."""
    return max(1, max(budget, _LEAST) // (16 * dtype.itemsize) // max(columns, 1))
