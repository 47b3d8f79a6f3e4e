from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_fwdattr.bank.files import copy_atomically, write_atomically
from hf_fwdattr.bank.tensors import read_tensors, slices, write_tensors


def copied(path: Path) -> None:
    source = path.parent / "source"
    source.write_bytes(b"new")
    copy_atomically(source, path)
    source.unlink()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, b"new"),
        lambda path: write_tensors(path, {"a": torch.ones(3)}),
        copied,
    ],
    ids=["bytes", "tensors", "copy"],
)
def test_open_reader_keeps_the_old_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """The new file takes the old one's name; the old one itself is never written to."""
    path = tmp_path / "file"
    path.write_bytes(b"old and long" * 100)
    with path.open("rb") as reader:
        write(path)
        assert reader.read() == b"old and long" * 100
    assert path.read_bytes() != b"old and long" * 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_tensors_survive_and_can_be_read_in_slices(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(35).reshape(7, 5).to(dtype)
    write_tensors(tmp_path / "t", {"a": tensor.T, "b": tensor})
    assert torch.equal(read_tensors(tmp_path / "t")["a"], tensor.T)
    assert torch.equal(torch.cat(list(slices(tmp_path / "t", "b", 3))), tensor)
    assert [len(part) for part in slices(tmp_path / "t", "b", 3)] == [3, 3, 1]
