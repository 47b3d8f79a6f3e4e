"""Writing a bank: new shards beside the old ones, then `bank.json`, then the old shards are removed."""

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import ResponseBank
from .codes import RowCodes
from .files import sha256_of, write_atomically
from .pages import hash_pages, page_size
from .schema import SHARD_KINDS, Manifest, ShardFile
from .tensors import finite, write_tensors
from .text import text_shards
from .verification import MANIFEST, names_in, refuse_unknown_files, remove_stale


__all__ = ["BankContents", "temporary_bank_folder", "write_bank"]

_SHARD = 1 << 30  # bytes per shard: few and large
_TEXT = 1 << 22  # bytes of text per shard: showing a few rows downloads the shards they are in
_ROW_CODES = 1 << 28


@dataclass
class BankContents:
    """Everything that is written into a bank.

    Attributes:
        description (`dict`): the manifest's fields, except those that follow from the tensors: `files`, `row_codes`,
            `error_projections`, `error_covariance`.
        directions (`Sequence[Tensor]`): matrices (k_i, P) whose lines follow each other.
        coordinates (`Tensor`): (rows, k).
        row_ids, sources (`Tensor`): (rows,).
        row_hashes (`Tensor`): (rows, 16) bytes.
        texts: of every row, in order; empty for none.
        row_codes (`RowCodes`, *optional*): responses of every row, in order.
        error_projections (`Mapping[str, Tensor]`): matrices of the gradient predictor by layer.
        error_covariance (`Tensor`, *optional*): (rows, rows) covariance of the gradient predictor's errors.
        averaged_weights (`Tensor`, *optional*): (P,) at which queries are evaluated, with `averaging="trajectory"`.
    """

    description: dict[str, Any]
    directions: Sequence[Tensor]
    coordinates: Tensor
    row_ids: Tensor
    row_hashes: Tensor
    sources: Tensor
    texts: Iterable[str] | None = None
    row_codes: RowCodes | None = None
    error_projections: Mapping[str, Tensor] = field(default_factory=dict)
    error_covariance: Tensor | None = None
    averaged_weights: Tensor | None = None

    def manifest(self, files: list[ShardFile]) -> Manifest:
        """Return the manifest of these contents in these files."""
        matrices = [{"name": name, "shape": list(table.shape)} for name, table in self.error_projections.items()]
        derived = {
            "row_codes": 0 if self.row_codes is None else len(self.row_codes), "error_projections": matrices,
            "error_covariance": self.error_covariance is not None, "page_size": _page_size(files), "files": files,
        }  # fmt: skip
        return Manifest.model_validate(self.description | derived)

    def shards(self, shard_size: int) -> Iterator[tuple[str, Iterable[dict[str, Tensor]]]]:
        """Yield every kind of shard with its shards' tensors, in the order in which they are written."""
        yield "directions", self._direction_shards(shard_size)
        yield "coordinates", self._row_shards(shard_size)
        yield "text", text_shards(self.texts or (), min(shard_size, _TEXT))
        yield "row_codes", self._code_shards(min(shard_size, _ROW_CODES))
        if self.error_projections:
            yield "error_projections", [
                {name: finite(matrix.half(), f"the error projection of {name}")
                 for name, matrix in self.error_projections.items()}
            ]  # fmt: skip
        if self.error_covariance is not None:
            covariance = finite(self.error_covariance.half(), "the error covariance in float16")
            yield "error_covariance", [{"error_covariance": covariance}]
        if self.averaged_weights is not None:
            weights = finite(self.averaged_weights.float(), "an averaged weight")
            yield "averaged_weights", [{"averaged_weights": weights}]

    def _direction_shards(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield rows' and sources' directions in shards of their own, so that a query of sources needs only theirs."""
        dtype, k = getattr(torch, self.description["dtype"]), self.description["directions"]
        width = max(1, size // (self.directions[0].shape[1] * dtype.itemsize))
        total = sum(len(part) for part in self.directions)
        for start, end in ((0, min(k, total)), (k, total)):
            for at in range(start, end, width):
                block = _lines(self.directions, at, min(at + width, end)).to(dtype)
                yield {"directions": finite(block, f"a direction in {self.description['dtype']}")}

    def _row_shards(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield coordinates, with ids, hashes and sources of the same rows."""
        dtype = getattr(torch, self.description["dtype"])
        width = max(1, size // (self.coordinates.shape[1] * dtype.itemsize + 32))
        for at in range(0, len(self.coordinates), width):
            block = slice(at, at + width)
            coordinates = self.coordinates[block].to(dtype)
            yield {
                "coordinates": finite(coordinates, f"a coordinate in {self.description['dtype']}"),
                "row_ids": self.row_ids[block],
                "row_hashes": self.row_hashes[block],
                "sources": self.sources[block].to(torch.int32),
            }

    def _code_shards(self, size: int) -> Iterator[dict[str, Tensor]]:
        if self.row_codes is not None:
            codes, scales = self.row_codes.codes, self.row_codes.scales
            width = max(1, size // max(codes.shape[1], 1))
            for at in range(0, len(codes), width):
                yield {"codes": codes[at : at + width], "scales": finite(scales[at : at + width], "a row code")}


def write_bank(folder: Path, contents: BankContents, shard_size: int = _SHARD) -> ResponseBank:
    """Write a bank and open it.

    Args:
        folder (`Path`): the bank's folder; an old bank in it stays whole until the last moment.
        shard_size (`int`): bytes per shard, at most.

    Raises:
        BankError: a value that is not finite, or a file in the folder that is no part of a bank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_unknown_files(names_in(folder), [MANIFEST], folder)
    tag = secrets.token_hex(4)
    written: list[ShardFile] = []
    try:
        for kind, parts in contents.shards(shard_size):
            first = 0
            for number, tensors in enumerate(parts):
                written.append(_write_shard(folder / f"{kind}-{tag}-{number:05d}.safetensors", kind, first, tensors))
                first += written[-1].lines
        written += _write_page_hashes(folder, tag, written)
        manifest = contents.manifest(written)
        write_atomically(folder / MANIFEST, manifest.to_json())
    except BaseException:
        # An interrupt may come just after bank.json was renamed into place: the files it names must stay.
        named = (folder / MANIFEST).read_text() if (folder / MANIFEST).is_file() else ""
        for path in folder.glob(f"*-{tag}-*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)
        raise
    remove_stale(folder, [file.name for file in manifest.files])
    return ResponseBank(folder)


def _write_shard(path: Path, kind: str, first: int, tensors: dict[str, Tensor]) -> ShardFile:
    write_tensors(path, tensors)
    lines = SHARD_KINDS[kind].count([tuple(tensor.shape) for tensor in tensors.values()])
    size = path.stat().st_size
    return ShardFile(name=path.name, kind=kind, size=size, sha256=sha256_of(path), first=first, lines=lines)


def _page_size(files: list[ShardFile]) -> int:
    return page_size(sum(file.size for file in files if SHARD_KINDS[file.kind].paged))


def _write_page_hashes(folder: Path, tag: str, files: list[ShardFile]) -> list[ShardFile]:
    """Write the hashes of all pages of the shards whose lines are read singly, if there are any."""
    paths = [folder / file.name for file in files if SHARD_KINDS[file.kind].paged]
    hashes = b"".join(hash_pages(path, _page_size(files)) for path in paths)
    if not hashes:
        return []
    table = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, 32)
    return [_write_shard(folder / f"page_hashes-{tag}-00000.safetensors", "page_hashes", 0, {"page_hashes": table})]


def _lines(parts: Sequence[Tensor], start: int, end: int) -> Tensor:
    """Return lines start..end of matrices laid below each other, without joining all of them."""
    chosen, at = [], 0
    for part in parts:
        first, last = max(start - at, 0), min(end - at, len(part))
        if first < last:
            chosen.append(part[first:last])
        at += len(part)
    return torch.cat(chosen)


def temporary_bank_folder() -> tuple[Path, Any]:
    """Return a temporary folder for a bank, and the object whose end of life removes it."""
    keeper = type("Keeper", (), {})()
    folder = tempfile.mkdtemp(prefix="fwdattr-bank-")
    weakref.finalize(keeper, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder), keeper
