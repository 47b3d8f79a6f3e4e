"""Files of a bank: written atomically, and read as untrusted input.

Only safetensors and JSON are read. Sizes are checked against the file's own length before anything is allocated.
"""

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import BankError


__all__ = [
    "LARGEST_HEADER", "FileMark", "Header", "StoredTensor", "copy_atomically", "file_mark", "inside", "read_header",
    "read_layout", "refuse_link", "sha256_of", "unique_json", "write_atomically",
]  # fmt: skip
FileMark = tuple[int, ...] | None  # device, inode, size and time of a file; None where there is none
Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of every tensor in a shard, by name

LARGEST_HEADER = 1 << 20  # bytes; safetensors itself parses up to 100 MB, which takes a gigabyte of memory
_CHUNK = 1 << 22
_MAX_VALUES = 1 << 20  # of a JSON text: each takes some hundred bytes once it is parsed


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: dtype, shape, and the bytes from `start` to `end` of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def width(self) -> int:
        """Bytes of a line, which is what belongs to one index of the first dimension."""
        return (self.end - self.start) // self.shape[0] if self.shape and self.shape[0] else 0


def write_atomically(path: Path, content: bytes | Callable[[str], object]) -> None:
    """Write a file under a temporary name beside it, flush it to disk, then rename it into place.

    Args:
        content: the bytes, or a function that writes the file at the path it is given.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    os.close(handle)
    try:
        if isinstance(content, bytes):
            Path(scratch).write_bytes(content)
        else:
            content(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file in the same way."""
    write_atomically(path, lambda scratch: shutil.copyfile(source, scratch))


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets folders be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal."""
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            result.update(chunk)
    return result.hexdigest()


def file_mark(path: Path) -> FileMark:
    """Return what changes when a file is replaced or written to."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a manifest names, which must lie directly in the bank's folder.

    Raises:
        BankError: an absolute path, a parent path, a sub-folder, or an empty name.
    """
    if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise BankError(
            f"bank.json names the file {name!r}, which is not a plain file name inside the bank's folder. Nothing "
            "outside the folder is read. Get the bank from where it was made"
        )
    return folder / name


def refuse_link(path: Path) -> None:
    """Refuse a link, unless it is the kind that the Hub's cache makes: from snapshots into the blobs beside them.

    Raises:
        BankError: it leads elsewhere.
    """
    if path.is_symlink():
        target = path.resolve()
        if target.parent.name != "blobs" or target.parent.parent not in path.parent.resolve().parents:
            raise BankError(f"{path} is a link that leads out of the bank's folder. Put the file itself there")


def read_header(path: Path) -> Header:
    """Return dtype and shape of every tensor in a safetensors file, after checking that its data is really there.

    Raises:
        BankError: not a safetensors file, a header that is too long or contradicts the file, or a truncated file.
    """
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_layout(path).items()}


def read_layout(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor in a safetensors file by name, after the checks of `read_header`; only its header is read.

    safetensors itself checks shapes against offsets, gaps, overlaps and the file's length; it does not refuse a
    tensor that is named twice, nor a header whose parsing fills the memory.

    Raises:
        BankError: not a safetensors file, a header that is too long or contradicts the file, or a truncated file.
    """
    try:
        length = path.stat().st_size
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(LARGEST_HEADER, length - 8):
                raise ValueError(f"its header claims {size} bytes")
            table: Any = unique_json(file.read(size))
        with safe_open(path, framework="np") as shard:  # checks every entry of the table
            parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)
            offsets = {name: [8 + size + at for at in table[name]["data_offsets"]] for name in parts}
            return {
                name: StoredTensor(part.get_dtype(), tuple(part.get_shape()), *offsets[name])
                for name, part in parts.items()
            }
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError, SafetensorError) as error:
        raise BankError(
            f"{path.name} is not a sound safetensors file ({error}). Download the bank again, or build it again"
        ) from error


def unique_json(data: bytes) -> object:
    """Parse JSON, refusing doubled keys and a text of so many values that parsing it would fill the memory.

    Raises:
        ValueError: either of them, or no JSON.
    """
    values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > _MAX_VALUES:
        raise ValueError(f"it holds up to {values} values; at most {_MAX_VALUES} are read")
    return json.loads(data, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
