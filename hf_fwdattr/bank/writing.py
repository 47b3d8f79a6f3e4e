"""Writing a bank: new shards beside the old ones, then `bank.json`, then the old shards are removed."""

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .bank import ResponseBank
from .codes import RowCodes
from .files import sha256_of, write_atomically
from .pages import hash_pages, page_size
from .schema import BITS, SHARD_KINDS, Manifest, ShardFile
from .tensors import finite, write_tensors
from .text import text_shards
from .verification import MANIFEST, names_in, refuse_unknown_files, remove_stale


__all__ = ["BankContents", "BankWriter", "temporary_bank_folder", "write_bank"]

_SHARD = 1 << 30  # bytes per shard: few and large
_TEXT = 1 << 22  # bytes of text per shard: showing a few rows downloads the shards they are in
_ROW_CODES = 1 << 28
_ROWS = 1 << 16  # that are read together


@dataclass
class BankContents:
    """Everything that is written into a bank.

    Attributes:
        description (`dict`): the manifest's fields, except those that follow from the tensors: `files`, `row_codes`,
            `error_projections`, `coordinate_scales`, `regression_features`.
        directions (`Sequence[Tensor]`): matrices (k_i, P) whose lines follow each other.
        coordinates (`Tensor`): (rows, k), or (rows, 1) where the directions are the rows themselves.
        row_ids, sources (`Tensor`): (rows,).
        row_hashes (`Tensor`): (rows, 16) bytes.
        texts: of every row, in order; empty for none.
        row_codes (`RowCodes`, *optional*): responses of every row, in order; or they were given to the writer before.
        outside (`Tensor`, *optional*): (rows,) norms of what is outside the directions, with `error_variances`.
        error_projections (`Mapping[str, Tensor]`): matrices of the gradient predictor by layer.
        derivative_regression (`Mapping[str, Tensor]`): tensors of the regression of derivatives, by name.
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
    derivative_regression: Mapping[str, Tensor] = field(default_factory=dict)
    outside: Tensor | None = None
    averaged_weights: Tensor | None = None

    def manifest(self, files: list[ShardFile]) -> Manifest:
        """Return the manifest of these contents in these files."""
        matrices = [{"name": name, "shape": list(table.shape)} for name, table in self.error_projections.items()]
        derived = {
            "row_codes": sum(file.lines for file in files if file.kind == "row_codes"), "files": files,
            "error_projections": matrices, "coordinate_scales": self._coordinate_scales.tolist(),
            "page_size": _page_size(files),
            "regression_features": max(0, len(self.derivative_regression.get("weights", ())) - 1),
        }  # fmt: skip
        return Manifest.model_validate(self.description | derived)

    def shards(self, shard_size: int) -> Iterator[tuple[str, Iterable[dict[str, Tensor]]]]:
        """Yield every kind of shard with its shards' tensors, in the order in which they are written."""
        yield "directions", self._direction_shards(shard_size)
        yield "coordinates", self._row_shards(shard_size)
        yield "text", text_shards(self.texts or (), min(shard_size, _TEXT))
        if self.error_projections:
            yield "error_projections", [
                {name: finite(matrix.half(), f"the error projection of {name}")
                 for name, matrix in self.error_projections.items()}
            ]  # fmt: skip
        if self.derivative_regression:
            parts = self.derivative_regression.items()
            yield "derivative_regression", [{name: finite(part, "a regression's number") for name, part in parts}]
        if self.averaged_weights is not None:
            weights = finite(self.averaged_weights.float(), "an averaged weight")
            yield "averaged_weights", [{"averaged_weights": weights}]

    def _direction_shards(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield rows' and sources' directions in shards of their own, so that a query of sources needs only theirs."""
        dtype, k = getattr(torch, self.description["dtype"]), self.description["directions"]
        width = max(1, size // (self.directions[0].shape[1] * dtype.itemsize))
        title = f"a direction in {self.description['dtype']}"
        total = sum(len(part) for part in self.directions)
        for start, end in ((0, min(k, total)), (k, total)):
            for at in range(start, end, width):
                block = finite(_lines(self.directions, at, min(at + width, end)), title)
                if dtype == torch.int8:
                    yield _tensors_of(RowCodes.of(block, max(BITS)))
                else:
                    yield {"directions": finite(block.to(dtype), title)}

    def _row_shards(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield coordinates, with ids, hashes and sources of the same rows."""
        name = self.description.get("coordinates_dtype", "float32")
        dtype = getattr(torch, name)
        width = max(1, size // (self.coordinates.shape[1] * dtype.itemsize + 36))
        for at in range(0, len(self.coordinates), width):
            block = slice(at, at + width)
            coordinates = finite(self.coordinates[block], f"a coordinate in {name}")
            tensors = {
                "row_ids": self.row_ids[block],
                "row_hashes": self.row_hashes[block],
                "sources": self.sources[block].to(torch.int32),
            }
            if dtype == torch.int8:
                multiples = coordinates.float() / self._coordinate_scales.clamp(min=torch.finfo(torch.float32).tiny)
                tensors["scales"] = multiples.abs().amax(1) / 127
                steps = tensors["scales"].clamp(min=torch.finfo(torch.float32).tiny)[:, None]
                tensors["coordinates"] = (multiples / steps).round().to(torch.int8)
            else:
                tensors["coordinates"] = finite(coordinates.to(dtype), f"a coordinate in {name}")
            if self.outside is not None:
                tensors["outside"] = finite(self.outside[block].float(), "the norm of a response")
            yield tensors

    @cached_property
    def _coordinate_scales(self) -> Tensor:
        """Root mean square of the coordinates along every direction, (k,) float32; none unless they are in 8 bits."""
        if self.description.get("coordinates_dtype") != "int8":
            return torch.zeros(0)
        squares = torch.zeros(self.coordinates.shape[1], dtype=torch.float64)
        for block in self.coordinates.split(_ROWS):
            squares += block.double().square().sum(0)
        return (squares / len(self.coordinates)).sqrt().float()


class BankWriter:
    """Writes a bank's shards beside those of an older bank; nothing of them counts before `finish`.

    A context: shards that no `bank.json` names are removed at its end.

    Args:
        folder (`Path`): the bank's folder; an old bank in it stays whole until the last moment.
        shard_size (`int`): bytes per shard, at most.

    Raises:
        BankError: a value that is not finite, or a file in the folder that is no part of a bank.
    """

    def __init__(self, folder: Path, shard_size: int = _SHARD):
        self.folder, self._shard_size = folder, shard_size
        self._tag = secrets.token_hex(4)
        self._written: list[ShardFile] = []
        self._codes: list[RowCodes] = []  # not yet written
        self._ready = False

    def __enter__(self) -> "BankWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # An interrupt may come just after bank.json was renamed into place: the files it names must stay.
        manifest = self.folder / MANIFEST
        named = manifest.read_text(encoding="utf-8") if manifest.is_file() else ""
        for path in self.folder.glob(f"*-{self._tag}-*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)

    def add_codes(self, codes: RowCodes) -> None:
        """Take the codes of the next rows."""
        self._codes.append(codes)
        if sum(part.codes.numel() for part in self._codes) >= min(self._shard_size, _ROW_CODES):
            self._write_codes()

    def finish(self, contents: BankContents) -> ResponseBank:
        """Write everything else, then `bank.json`; remove the shards of an older bank, and open the new one."""
        self._prepare()
        if contents.row_codes is not None:
            codes, width = contents.row_codes, max(1, self._shard_size // max(contents.row_codes.codes.shape[1], 1))
            for start in range(0, len(codes), width):
                self.add_codes(codes[start : start + width])
        self._write_codes()
        for kind, parts in contents.shards(self._shard_size):
            for tensors in parts:
                self._write(kind, tensors)
        self._write_page_hashes()
        manifest = contents.manifest(self._written)
        write_atomically(self.folder / MANIFEST, manifest.to_json())
        remove_stale(self.folder, [file.name for file in manifest.files])
        return ResponseBank(self.folder)

    def _prepare(self) -> None:
        if not self._ready:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_unknown_files(names_in(self.folder), [MANIFEST], self.folder)
            self._ready = True

    def _write_codes(self) -> None:
        if self._codes:
            first = self._codes[0]
            codes, scales = (torch.cat([getattr(part, name) for part in self._codes]) for name in ("codes", "scales"))
            if not any(file.kind == "code_weights" for file in self._written):
                weights = torch.ones(first.size) if first.weights is None else first.weights
                self._write("code_weights", {"code_weights": finite(weights.float(), "a weight of row codes")})
            self._write("row_codes", _tensors_of(RowCodes(codes, scales, first.bits, first.size)))
            self._codes = []

    def _write_page_hashes(self) -> None:
        """Write the hashes of all pages of the shards whose lines are read singly, if there are any."""
        paths = [self.folder / file.name for file in self._written if SHARD_KINDS[file.kind].paged]
        hashes = b"".join(hash_pages(path, _page_size(self._written)) for path in paths)
        if hashes:
            table = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, 32)
            self._write("page_hashes", {"page_hashes": table})

    def _write(self, kind: str, tensors: dict[str, Tensor]) -> None:
        self._prepare()
        before = [file for file in self._written if file.kind == kind]
        path = self.folder / f"{kind}-{self._tag}-{len(before):05d}.safetensors"
        write_tensors(path, tensors)
        lines = SHARD_KINDS[kind].count([tuple(tensor.shape) for tensor in tensors.values()])
        self._written.append(ShardFile(
            name=path.name, kind=kind, size=path.stat().st_size, sha256=sha256_of(path),
            first=sum(file.lines for file in before), lines=lines,
        ))  # fmt: skip


def write_bank(folder: Path, contents: BankContents, shard_size: int = _SHARD) -> ResponseBank:
    """Write a bank and open it; see [`BankWriter`] for arguments and errors."""
    with BankWriter(folder, shard_size) as writer:
        return writer.finish(contents)


def _tensors_of(codes: RowCodes) -> dict[str, Tensor]:
    return {"codes": codes.codes, "scales": finite(codes.scales, "the scale of a code")}


def _page_size(files: list[ShardFile]) -> int:
    return page_size(sum(file.size for file in files if SHARD_KINDS[file.kind].paged))


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
