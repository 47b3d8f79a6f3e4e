"""Files of a bank: written so that a kill leaves the old one or none, read as what they are: untrusted.

Only safetensors and JSON. Every size is checked against the file's own length before anything is allocated.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BankError


# Nothing else in the folder is ever deleted: shards under the names that `write_bank` gives, and unfinished files.
# (safetensors writes its files as .tmp and six letters first, and a kill leaves them.)
SHARD_PATTERN = re.compile(
    r"(?:directions|coordinates|text|row_codes|error_projections|error_covariance|averaged_weights)-[0-9a-f]{8}-[0-9]{5}\.safetensors|\.partial-.+|\.tmp[0-9A-Za-z]{6}"
)
_HARMLESS = re.compile(r"\..+|.+\.(?:md|txt)|LICENSE|NOTICE")
_MODELS = {"config.json", "adapter_config.json"}
_CHUNK = 1 << 22
_MAX_HEADER = 1 << 20
_MOST_VALUES = 1 << 20  # of a JSON text: each takes some hundred bytes once it is parsed
_WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, flush it to disk, then rename it into place."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in the same way."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file under a temporary name, flush it to disk, then rename it into place."""
    scratch = path.parent / f".partial-{path.name}"
    try:
        shutil.copyfile(source, scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            result.update(chunk)
    return result.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names, which must lie directly in the bank's folder.

    Raises:
        BankError: an absolute path, a parent path, a sub-folder, or a link that leads elsewhere.
    """
    if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise BankError(f"bank.json names the file {name!r}, which is not a plain file name inside the bank's folder")
    return folder / name


def no_link(path: Path) -> None:
    """Refuse a link, unless it is the kind that the Hub's cache makes: from snapshots into the blobs beside them.

    Raises:
        BankError: it leads elsewhere.
    """
    if path.is_symlink():
        target = path.resolve()
        if target.parent.name != "blobs" or target.parent.parent not in path.parent.resolve().parents:
            raise BankError(f"{path} is a link that leads out of the bank's folder; put the file itself there")


def refuse_unknown_files(names: Iterable[str], known: Iterable[str], where: object) -> None:
    """Refuse files in a bank's own folder that `bank.json` does not name: who put them there wants them to be read.

    Left alone are shards of a bank that is being written or was replaced, hidden files, Markdown, plain text and
    licences, and everything in a folder that is a model's as well. None of it is ever read.

    Raises:
        BankError: naming the first.
    """
    found = set(names)
    if found & _MODELS:
        return
    for name in sorted(found - set(known)):
        if not SHARD_PATTERN.fullmatch(name) and not _HARMLESS.fullmatch(name):
            raise BankError(f"{where} holds {name!r}, which bank.json does not name; move it away, or look who put it")


def names_in(folder: Path) -> list[str]:
    """Names of what lies in a folder, but for its sub-folders."""
    return [path.name for path in folder.iterdir() if path.is_symlink() or not path.is_dir()]


def remove_stale(folder: Path, current: Iterable[str]) -> None:
    """Remove shards of banks that were here before, and what killed runs left."""
    named = set(current)
    for path in folder.iterdir():
        if SHARD_PATTERN.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that this package wrote itself."""
    check_header(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def check_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor in a safetensors file, after checking that its data is really there.

    Raises:
        BankError: not a safetensors file, a header that is too long or lies about sizes, or a truncated file.
    """
    try:
        table = _header(path)
        with safe_open(path, framework="pt"):  # maps the file; its own parser must agree too
            return table
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError, SafetensorError) as error:
        raise BankError(
            f"{path.name} is not a sound safetensors file ({error}); download or build the bank again"
        ) from error


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    length = path.stat().st_size
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > min(_MAX_HEADER, length - 8):
            raise ValueError(f"its header claims {size} bytes")
        header = json.loads(file.read(size), object_pairs_hook=_unique)
    table, extents = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        wanted = _WIDTH[entry["dtype"]]
        for extent in entry["shape"]:
            if type(extent) is not int or extent < 0:
                raise ValueError(f"tensor {name} has shape {entry['shape']}")
            wanted *= extent
        if type(first) is not int or type(last) is not int or not 0 <= first <= last or last - first != wanted:
            raise ValueError(f"tensor {name} declares {wanted} bytes at {first}..{last}")
        table[name] = (entry["dtype"], tuple(entry["shape"]))
        extents.append((first, last))
    end = 0
    for first, last in sorted(extents):
        if first != end:
            raise ValueError(f"its data has a gap or an overlap at {end}")
        end = last
    if 8 + size + end != length:
        raise ValueError(f"it should be {8 + size + end} bytes long and is {length}")
    return table


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def unique_json(data: bytes) -> object:
    """Parsed JSON, with doubled keys refused, and a text of so many values that parsing it would fill memory."""
    values = 1 + sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > _MOST_VALUES:
        raise ValueError(f"it holds up to {values} values; at most {_MOST_VALUES} are read")
    return json.loads(data, object_pairs_hook=_unique)


def slices(path: Path, name: str, width: int) -> Iterator[Tensor]:
    """A tensor's lines, `width` at a time, without reading the whole of it."""
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        total = part.get_shape()[0]
        for start in range(0, total, width):
            yield part[start : min(start + width, total)]


def finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor itself, if every value is finite.

    Raises:
        BankError: NaN or infinity, with the place named.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise BankError(f"{where} holds NaN or infinity; build the bank again")
    return tensor
