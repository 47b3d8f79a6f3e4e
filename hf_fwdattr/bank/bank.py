"""The response bank: probes, coordinates, and what they belong to. It lives on disk and is read as it is needed."""

import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import BankError, MismatchError
from ..parameters import Parameters
from .files import (
    check_header,
    copy_atomically,
    digest,
    finite,
    inside,
    slices,
    write_atomically,
    write_tensors,
)
from .manifest import MANIFEST, File, Manifest, read_manifest


_SHARD = 1 << 30  # bytes per shard: few and large
_STREAM = 1 << 14  # rows that are scored together
# Nothing else in the folder is ever deleted: shards under the names that `write_bank` gives, and unfinished files.
_OURS = re.compile(r"(?:probes|coordinates)-[0-9a-f]{8}-[0-9]{5}\.safetensors|\.partial-.+")


class ResponseBank:
    """A verified bank on disk.

    Use [`~ResponseBank.from_pretrained`], or take the one that [`ResponseCallback`] or [`build_bank`] made.

    Attributes:
        folder (`Path`): where it lies.
        manifest (`Manifest`): what `bank.json` says.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        _check_files(self.folder, self.manifest, verify)
        self._keep: Any = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "fwdattr"
    ) -> "ResponseBank":
        """Open the bank of a model folder (or a bank's own folder).

        Raises:
            BankError: there is no bank, or it is damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        return cls(folder if (folder / MANIFEST).is_file() else folder / subfolder)

    def save_pretrained(self, save_directory: str | Path, *, subfolder: str = "fwdattr") -> Path:
        """Copy the bank to `save_directory/subfolder`, atomically; returns that folder."""
        target = Path(save_directory) / subfolder
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == self.folder.resolve():
            return target
        for file in self.manifest.files:
            copy_atomically(self.folder / file.name, target / file.name)
        write_atomically(target / MANIFEST, self.manifest.to_json())
        _sweep(target, self.manifest)
        return target

    def __len__(self) -> int:
        """Number of rows."""
        return self.manifest.dataset.rows

    def check_model(self, model: nn.Module) -> Parameters:
        """The responding parameters in a live model, after checking that the bank belongs to it.

        Raises:
            MismatchError: other names, shapes or weights; both values are named.
        """
        wanted = {parameter.name: tuple(parameter.shape) for parameter in self.manifest.parameters}
        try:
            found = Parameters.of(model, [f"^{_escaped(name)}$" for name in wanted])
        except Exception as error:
            raise MismatchError(
                f"the bank's responding parameters, such as {next(iter(wanted))}, are not in this model; load the "
                f"adapter or model that the bank was made for ({self.manifest.model})"
            ) from error
        shapes = dict(zip(found.names, found.shapes, strict=True))
        for name, shape in wanted.items():
            if shapes.get(name) != shape:
                raise MismatchError(
                    f"{name} has shape {shape} in the bank and {shapes.get(name, 'no place')} in the model; load the "
                    f"adapter or model that the bank was made for ({self.manifest.model})"
                )
        place = {name: index for index, name in enumerate(found.names)}
        order = [place[name] for name in wanted]
        parameters = Parameters(
            tuple(found.live[i] for i in order), tuple(wanted), tuple(found.shapes[i] for i in order)
        )
        weights = parameters.fingerprint(model)
        if weights != self.manifest.weights:
            raise MismatchError(
                f"the bank belongs to weights with sha256 {self.manifest.weights[:16]}... and the model's responding "
                f"weights have {weights[:16]}...; load the revision that the bank was made for, in the dtype it was "
                "saved in, or build the bank again"
            )
        return parameters

    def check_length(self, rows: int) -> None:
        """Compare a dataset's number of rows with the bank's.

        Raises:
            MismatchError: they differ.
        """
        if rows != len(self):
            raise MismatchError(f"the bank has {len(self)} rows and the dataset {rows}; pass the training set")

    def check_rows(self, hashes: Sequence[bytes]) -> None:
        """Compare hashes of a dataset's rows, in order, with the bank's; see `response.rows.row_hashes`.

        Raises:
            MismatchError: another number of rows, or the first row that differs.
        """
        self.check_length(len(hashes))
        own = (bytes(line.tolist()) for block in self.row_hashes() for line in block)
        for at, (mine, theirs) in enumerate(zip(own, hashes, strict=True)):
            if mine != theirs:
                raise MismatchError(
                    f"row {at} of the dataset is not the row that was trained on (token hash {theirs.hex()}, bank "
                    f"{mine.hex()}); pass the training set, in its order, tokenized as then"
                )

    @property
    def salt(self) -> bytes:
        """Key of the row hashes, 16 bytes."""
        return bytes.fromhex(self.manifest.salt)

    def probes(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(k + source probes, P), the row probes first."""
        parts = []
        for file in self._files("probes"):
            with safe_open(self.folder / file.name, framework="pt") as shard:
                parts.append(finite(shard.get_tensor("probes").to(dtype), file.name))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def coordinates(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of rows: their ids (n,), sources (n,) with -1 for none, and coordinates (n, k) in float32."""
        for file in self._files("coordinates"):
            path = self.folder / file.name
            parts = (slices(path, name, _STREAM) for name in ("row_ids", "sources", "coordinates"))
            for ids, sources, block in zip(*parts, strict=True):
                if len(sources) and not -1 <= int(sources.min()) <= int(sources.max()) < len(self.manifest.sources):
                    raise BankError(f"{file.name} names sources beyond the {len(self.manifest.sources)} of bank.json")
                yield ids, sources, finite(block.float(), file.name)

    def row_hashes(self) -> Iterator[Tensor]:
        """Blocks of (n, 16) bytes."""
        for file in self._files("coordinates"):
            yield from slices(self.folder / file.name, "row_hashes", _STREAM)

    def _files(self, kind: str) -> list[File]:
        return [file for file in self.manifest.files if file.kind == kind]


def write_bank(
    folder: Path,
    described: dict[str, Any],
    probes: Sequence[Tensor],
    coordinates: Tensor,
    row_ids: Tensor,
    row_hashes: Tensor,
    sources: Tensor,
    shard_size: int = _SHARD,
) -> ResponseBank:
    """Write a bank and open it: new shards beside the old ones, then `bank.json`, then the old shards go.

    Args:
        folder (`Path`): the bank's folder; an old bank in it stays whole until the last moment.
        described (`dict`): the manifest's fields, but `files`.
        probes (`Sequence[Tensor]`): matrices (k_i, P) whose lines follow each other.
        coordinates (`Tensor`): (rows, k). row_ids, sources: (rows,). row_hashes: (rows, 16) bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, described["dtype"])
    tag = secrets.token_hex(4)
    written: list[File] = []
    try:
        lines, width = sum(len(part) for part in probes), max(1, shard_size // (probes[0].shape[1] * dtype.itemsize))
        for number, start in enumerate(range(0, lines, width)):
            block = _lines(probes, start, min(start + width, lines)).to(dtype)
            written.append(
                _shard(
                    folder,
                    f"probes-{tag}-{number:05d}.safetensors",
                    "probes",
                    start,
                    {"probes": finite(block, f"a probe in {described['dtype']}")},
                )
            )
        width = max(1, shard_size // (coordinates.shape[1] * dtype.itemsize + 32))
        for number, start in enumerate(range(0, len(coordinates), width)):
            part = slice(start, start + width)
            tensors = {
                "coordinates": finite(coordinates[part].to(dtype), f"a coordinate in {described['dtype']}"),
                "row_ids": row_ids[part], "row_hashes": row_hashes[part], "sources": sources[part].to(torch.int32),
            }  # fmt: skip
            written.append(
                _shard(folder, f"coordinates-{tag}-{number:05d}.safetensors", "coordinates", start, tensors)
            )
        manifest = Manifest.model_validate(described | {"files": written})
        write_atomically(folder / MANIFEST, manifest.to_json())
    except BaseException:
        # An interrupt may come just after bank.json was renamed into place: what it names must stay.
        named = (folder / MANIFEST).read_text() if (folder / MANIFEST).is_file() else ""
        for file in folder.glob(f"*-{tag}-*.safetensors"):
            if file.name not in named:
                file.unlink(missing_ok=True)
        raise
    _sweep(folder, manifest)
    return ResponseBank(folder)


def temporary_bank_folder() -> tuple[Path, Any]:
    """A folder for a bank that nobody gave a place, and the object whose end of life removes it."""
    keeper = type("Keeper", (), {})()
    folder = tempfile.mkdtemp(prefix="fwdattr-bank-")
    weakref.finalize(keeper, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder), keeper


def _lines(parts: Sequence[Tensor], start: int, end: int) -> Tensor:
    """Lines start..end of matrices laid below each other, without joining all of them."""
    chosen, at = [], 0
    for part in parts:
        first, last = max(start - at, 0), min(end - at, len(part))
        if first < last:
            chosen.append(part[first:last])
        at += len(part)
    return torch.cat(chosen)


def _shard(folder: Path, name: str, kind: Any, first: int, tensors: dict[str, Tensor]) -> File:
    write_tensors(folder / name, tensors)
    path, lines = folder / name, len(next(iter(tensors.values())))
    return File(name=name, kind=kind, size=path.stat().st_size, sha256=digest(path), first=first, lines=lines)


def _sweep(folder: Path, manifest: Manifest) -> None:
    """Remove shards of banks that were here before, and what killed runs left."""
    current = {file.name for file in manifest.files}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in current:
            path.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    """Sizes, hashes, headers: every file is what the manifest says, and nothing is missing.

    Raises:
        BankError: naming the file, and both values.
    """
    width = manifest.probes + manifest.source_probes
    expected: dict[str, int] = {"probes": 0, "coordinates": 0}
    stored = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[manifest.dtype]
    for file in manifest.files:
        path = inside(folder, file.name)
        if path.is_symlink() and not _in_cache(path):
            raise BankError(f"{path} is a link that leads out of the bank's folder; put the file itself there")
        if not path.is_file():
            raise BankError(f"{path} is missing; download the bank again")
        size = path.stat().st_size
        if size != file.size:
            raise BankError(f"{path} has {size} bytes and bank.json says {file.size}; download the bank again")
        if verify and digest(path) != file.sha256:
            raise BankError(f"{path} was changed: its sha256 is not {file.sha256[:16]}... as bank.json says")
        if file.first != expected[file.kind]:
            raise BankError(f"{file.name} begins at line {file.first} and should begin at {expected[file.kind]}")
        expected[file.kind] += file.lines
        lines, k = file.lines, manifest.probes
        wanted = {
            "probes": {"probes": (stored, (lines, manifest.size))},
            "coordinates": {
                "coordinates": (stored, (lines, k)), "row_ids": ("I64", (lines,)),
                "row_hashes": ("U8", (lines, 16)), "sources": ("I32", (lines,)),
            },
        }[file.kind]  # fmt: skip
        found = check_header(path)
        if found != wanted:
            raise BankError(f"{file.name} holds {found} and bank.json says {wanted}")
    if expected != {"probes": width, "coordinates": manifest.dataset.rows}:
        raise BankError(
            f"the shards hold {expected['probes']} probes and {expected['coordinates']} rows; bank.json says {width} "
            f"and {manifest.dataset.rows}"
        )


def _in_cache(path: Path) -> bool:
    """Whether a link is the kind that the Hub's cache makes: from snapshots into the blobs beside them."""
    target = path.resolve()
    return target.parent.name == "blobs" and target.parent.parent in path.parent.resolve().parents
