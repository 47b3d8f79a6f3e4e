"""Where big (rows, P) matrices live: in memory while the budget lasts, in a memory map on disk after that."""

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Storage:
    """Hands out zeroed matrices within a budget; use as a context, which removes the memory maps at its end.

    Args:
        budget (`int`): bytes that may be held in memory; what comes after that is mapped from disk.
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
        """A zero matrix (rows, columns) on the CPU.

        Raises:
            OSError: neither memory nor disk has room for it.
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
                f"the passes need {size / 2**30:.1f} GiB of disk in {self._folder} and {free / 2**30:.1f} are free; "
                "raise memory_budget, lower curvature_samples, or let fewer parameters respond"
            )
        self.spilled += size
        path = self._folder / f"{self.spilled}.bin"
        with path.open("wb") as file:
            if hasattr(
                os, "posix_fallocate"
            ):  # a sparse file on a full disk would kill the process at some later write
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        return torch.from_numpy(np.memmap(path, _NUMPY[dtype], "r+", shape=(rows, columns)))


def blocks(size: int, width: int) -> list[slice]:
    """Slices of at most `width` that cover range(size)."""
    return [slice(start, min(start + width, size)) for start in range(0, size, max(1, width))]
