import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_fwdattr.response.storage import Storage, blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_beyond_the_budget_go_to_disk_until_the_end(tmp_path: Path, dtype: torch.dtype) -> None:
    size = 10 * 30 * dtype.itemsize
    with Storage(size, tmp_path) as storage:
        held = storage.zeros(10, 30, dtype)
        assert not list(tmp_path.rglob("*.bin"))
        spilled = [storage.zeros(10, 30, dtype) for _ in range(2)]
        assert [path.stat().st_size for path in tmp_path.rglob("*.bin")] == [size, size]
        for matrix in (held, *spilled):
            assert matrix.dtype == dtype
            assert matrix.shape == (10, 30)
            assert not matrix.any()
        spilled[0][3] = 7.0
        assert not spilled[1].any()
        assert float(spilled[0].sum()) == 210.0
        assert (storage.held, storage.spilled) == (size, 2 * size)
    assert not list(tmp_path.iterdir())


def test_memory_maps_are_removed_after_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Storage(0, tmp_path) as storage:
            storage.zeros(3, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_empty_matrices_need_no_memory(tmp_path: Path) -> None:
    with Storage(0, tmp_path) as storage:
        assert storage.zeros(0, 5).shape == (0, 5)
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused_before_the_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with Storage(0, tmp_path) as storage, pytest.raises(OSError, match="raise memory_budget"):
        storage.zeros(10, 30)


def test_disk_blocks_are_reserved(tmp_path: Path) -> None:
    """A sparse file on a disk that fills up later would end the process with SIGBUS."""
    with Storage(0, tmp_path) as storage:
        storage.zeros(1000, 1000)
        (path,) = tmp_path.rglob("*.bin")
        assert path.stat().st_blocks * 512 >= 4_000_000


def test_a_disk_that_fills_up_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Storage(0, tmp_path) as storage, pytest.raises(OSError, match="No space left"):
        storage.zeros(10, 30)


def test_blocks_cover_a_range_once() -> None:
    for size in (0, 1, 6, 7, 8):
        covered = [index for part in blocks(size, 3) for index in range(size)[part]]
        assert covered == list(range(size))
        assert all(part.stop - part.start <= 3 for part in blocks(size, 3))
