"""Tensors of a bank's shards: written atomically, read in slices, refused where they are not finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BankError
from .files import StoredTensor, read_header, write_atomically
from .pages import Lines


__all__ = ["finite", "from_lines", "open_shard", "read_tensors", "slices", "write_tensors"]

_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda scratch: save_file(contiguous, scratch, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        BankError: it is not a sound safetensors file.
    """
    read_header(path)
    with open_shard(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file whose header was verified.

    Raises:
        BankError: it was removed or damaged since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BankError(f"{path} cannot be read ({error}). It was removed or damaged. Open the bank again") from error


def slices(path: Path, name: str, width: int) -> Iterator[Tensor]:
    """Yield a tensor's lines, `width` at a time, without reading the whole of it."""
    with open_shard(path) as file:
        part = file.get_slice(name)
        total = part.get_shape()[0]
        for start in range(0, total, width):
            yield part[start : min(start + width, total)]


def from_lines(stored: StoredTensor, lines: Lines) -> Tensor:
    """Return lines of a stored tensor from their bytes, (lines, bytes of a line): (lines, ...) in its own dtype."""
    dtype = _DTYPES[stored.dtype]
    flat = torch.from_numpy(lines).view(dtype) if lines.size else torch.zeros(len(lines), 0, dtype=dtype)
    return flat.view(len(lines), *stored.shape[1:])


def finite(tensor: Tensor, what: str) -> Tensor:
    """Return the tensor itself, if every value is finite.

    Raises:
        BankError: NaN or infinity, with `what` named.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise BankError(f"{what} holds NaN or infinity. No score would be right. Build the bank again")
    return tensor
