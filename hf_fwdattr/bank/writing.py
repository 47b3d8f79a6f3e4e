"""A bank is written: new shards beside the old ones, then `bank.json`, then the old shards go."""

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import ResponseBank
from .codes import RowCodes
from .files import digest, finite, names_in, refuse_unknown_files, remove_stale, write_atomically, write_tensors
from .schema import MANIFEST, File, Manifest
from .text import packed


_SHARD = 1 << 30  # bytes per shard: few and large
_TEXT = 1 << 22  # bytes of text per shard: whoever looks at a handful of rows downloads the shards they are in
_RESPONSES = 1 << 28  # of rows' own responses


def write_bank(
    folder: Path,
    described: dict[str, Any],
    directions: Sequence[Tensor],
    coordinates: Tensor,
    row_ids: Tensor,
    row_hashes: Tensor,
    sources: Tensor,
    shard_size: int = _SHARD,
    texts: Iterable[str] | None = None,
    responses: RowCodes | None = None,
    error_projections: Mapping[str, Tensor] | None = None,
    error_covariance: Tensor | None = None,
    weights: Tensor | None = None,
) -> ResponseBank:
    """Write a bank and open it.

    Args:
        folder (`Path`): the bank's folder; an old bank in it stays whole until the last moment.
        described (`dict`): the manifest's fields, but `files`.
        directions (`Sequence[Tensor]`): matrices (k_i, P) whose lines follow each other.
        coordinates (`Tensor`): (rows, k). row_ids, sources: (rows,). row_hashes: (rows, 16) bytes.
        texts (*optional*): of every row, in order.
        responses (`RowCodes`, *optional*): of every row, in order.
        error_projections (`Mapping[str, Tensor]`, *optional*): of errors; see `synthetic.gradients`.
        error_covariance (`Tensor`, *optional*): (rows, rows) how errors of first looks go together; see `kriging`.
        weights (`Tensor`, *optional*): (P,) at which queries are read, where `averaging` is `trajectory`.

    Raises:
        BankError: a value that is not finite, or a file in the folder that is no part of a bank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_unknown_files(names_in(folder), [MANIFEST], folder)
    tag = secrets.token_hex(4)
    written: list[File] = []
    try:
        lines = (coordinates, row_ids, row_hashes, sources.to(torch.int32))
        shards = {
            "directions": _probe_shards(directions, described, shard_size),
            "coordinates": _row_shards(lines, described, shard_size),
            "text": packed(texts or (), min(shard_size, _TEXT)),
            "row_codes": _response_shards(responses, min(shard_size, _RESPONSES)),
            "error_projections": _map_shards(error_projections or {}),
            "error_covariance": []
            if error_covariance is None
            else [{"error_covariance": finite(error_covariance.half(), "the kernel of first looks")}],
            "averaged_weights": _weights_shard(weights),
        }
        for kind, parts in shards.items():
            first = 0
            for number, tensors in enumerate(parts):
                written.append(_shard(folder, f"{kind}-{tag}-{number:05d}.safetensors", kind, first, tensors))
                first += written[-1].lines
        tables = [{"name": name, "shape": list(table.shape)} for name, table in (error_projections or {}).items()]
        kept = {
            "row_codes": 0 if responses is None else len(responses),
            "error_projections": tables,
            "error_covariance": error_covariance is not None,
        }
        manifest = Manifest.model_validate(described | kept | {"files": written})
        write_atomically(folder / MANIFEST, manifest.to_json())
    except BaseException:
        # An interrupt may come just after bank.json was renamed into place: what it names must stay.
        named = (folder / MANIFEST).read_text() if (folder / MANIFEST).is_file() else ""
        for file in folder.glob(f"*-{tag}-*.safetensors"):
            if file.name not in named:
                file.unlink(missing_ok=True)
        raise
    remove_stale(folder, [file.name for file in manifest.files])
    return ResponseBank(folder)


def temporary_bank_folder() -> tuple[Path, Any]:
    """A folder for a bank that nobody gave a place, and the object whose end of life removes it."""
    keeper = type("Keeper", (), {})()
    folder = tempfile.mkdtemp(prefix="fwdattr-bank-")
    weakref.finalize(keeper, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder), keeper


def _probe_shards(directions: Sequence[Tensor], described: dict[str, Any], size: int) -> Iterator[dict[str, Tensor]]:
    """Rows' directions and sources' directions in shards of their own, so that a query of sources needs only theirs."""
    dtype, k = getattr(torch, described["dtype"]), described["directions"]
    width, total = max(1, size // (directions[0].shape[1] * dtype.itemsize)), sum(len(part) for part in directions)
    for start, end in ((0, min(k, total)), (k, total)):
        for at in range(start, end, width):
            block = _lines(directions, at, min(at + width, end)).to(dtype)
            yield {"directions": finite(block, f"a direction in {described['dtype']}")}


def _row_shards(parts: Sequence[Tensor], described: dict[str, Any], size: int) -> Iterator[dict[str, Tensor]]:
    """Coordinates, with ids, hashes and sources of the same rows."""
    dtype = getattr(torch, described["dtype"])
    width = max(1, size // (parts[0].shape[1] * dtype.itemsize + 32))
    for at in range(0, len(parts[0]), width):
        coordinates, ids, hashes, sources = (part[at : at + width] for part in parts)
        coordinates = finite(coordinates.to(dtype), f"a coordinate in {described['dtype']}")
        yield {"coordinates": coordinates, "row_ids": ids, "row_hashes": hashes, "sources": sources}


def _response_shards(responses: RowCodes | None, size: int) -> Iterator[dict[str, Tensor]]:
    if responses is not None:
        width = max(1, size // max(responses.values.shape[1], 1))
        for at in range(0, len(responses), width):
            steps = finite(responses.steps[at : at + width], "a row's own response")
            yield {"codes": responses.values[at : at + width], "scales": steps}


def _map_shards(error_projections: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """All of them in one shard: each query needs all."""
    if error_projections:
        yield {
            name: finite(table.to(torch.float16), f"the map of {name}") for name, table in error_projections.items()
        }


def _weights_shard(weights: Tensor | None) -> Iterator[dict[str, Tensor]]:
    if weights is not None:
        yield {"averaged_weights": finite(weights.float(), "a mean of weights")}


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
    if kind in ("error_projections", "averaged_weights"):
        lines = len(tensors)
    lines -= kind == "text"  # its first tensor says where each row begins, and where the last ends
    return File(name=name, kind=kind, size=path.stat().st_size, sha256=digest(path), first=first, lines=lines)
