"""The response bank: probes, coordinates, and what they belong to. It lives on disk and is read as it is needed."""

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import BankError, MismatchError
from ..parameters import Parameters
from .files import OURS, copy_atomically, digest, finite, inside, slices, write_atomically, write_tensors
from .hub import Remote, is_repository, pinned
from .identity import check_model, check_rows, check_tokenizer
from .manifest import MANIFEST, File, Manifest, read_manifest, read_pointer
from .push import push
from .shards import check_layout, check_shard, check_table


_SHARD = 1 << 30  # bytes per shard: few and large
_STREAM = 1 << 14  # rows that are scored together


class ResponseBank:
    """A verified bank on disk.

    Use [`~ResponseBank.from_pretrained`], or take the one that [`ResponseCallback`] or [`build_bank`] made.

    Attributes:
        folder (`Path`): where it lies; its shards may still be on the Hub.
        remote (`Remote`, *optional*): the repository and commit that it is read from.
        manifest (`Manifest`): what `bank.json` says.
    """

    def __init__(self, folder: str | Path, verify: bool = True, remote: Remote | None = None):
        self.folder, self.remote = Path(folder), remote
        self.manifest = read_manifest(self.folder)
        self._verify = verify
        self._sound: dict[str, Path] = {}
        self._keep: Any = None
        if remote is not None:  # shards are downloaded, and looked at, when they are needed
            check_layout(self.manifest)
            remote.check(self.manifest.files)
            return
        for file in self.manifest.files:
            self.path(file)
        check_layout(self.manifest)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str = "fwdattr",
        revision: str | None = None,
        repo_type: str = "model",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "ResponseBank":
        """Open the bank of a model: of a folder, or of a repository on the Hub.

        From the Hub only `bank.json` is read at once, everything at the commit that `revision` points to now. Shards
        are downloaded when they are needed, each verified before it is used.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a model's folder, a bank's own folder, or a repository.
            subfolder (`str`, defaults to `fwdattr`): the bank's folder inside; "" for the root.
            revision (`str`, *optional*): branch, tag or commit.
            repo_type (`str`, defaults to `model`): `dataset` for a bank in a dataset repository of its own.
            token, cache_dir, local_files_only, force_download: as of `hf_hub_download`.

        Raises:
            BankError: there is no bank, it is damaged, or the Hub cannot be asked.
        """
        hub: dict[str, Any] = {
            "revision": revision, "repo_type": repo_type, "token": token, "cache_dir": cache_dir,
            "local_files_only": local_files_only, "force_download": force_download,
        }  # fmt: skip
        name = str(pretrained_model_name_or_path)
        if is_repository(name):
            remote = pinned(name, subfolder=subfolder, **hub)
            path = remote.manifest()
        else:
            folder = Path(pretrained_model_name_or_path)
            path = next((p for p in (folder / MANIFEST, folder / subfolder / MANIFEST) if p.is_file()), folder)
            if path == folder or (pointer := read_pointer(path)) is None:
                return cls(folder / subfolder if path == folder else path.parent)
            remote = pinned(pointer.bank_repo, **hub | {"repo_type": pointer.repo_type, "revision": pointer.revision})
        if (pointer := read_pointer(path)) is not None:
            remote = remote.follow(pointer)
            path = remote.manifest()
        return cls(path.parent, remote=remote)

    def path(self, file: File) -> Path:
        """A shard on disk, downloaded if it must be, and verified once.

        Raises:
            BankError: it is not what `bank.json` says.
        """
        if file.name not in self._sound:
            path = inside(self.folder, file.name)
            if self.remote is not None:
                path = self.remote.fetch(file.name)
            check_shard(path, file, self.manifest, self._verify)
            self._sound[file.name] = path
        return self._sound[file.name]

    def inspect(self) -> "ResponseBank":
        """Compare every shard's header with `bank.json`; on the Hub by range requests, without downloading a shard.

        Raises:
            BankError: a shard is not what `bank.json` says.
        """
        for file in self.manifest.files:
            if self.remote is None or self.remote.offline:
                self.path(file)
            else:
                check_table(self.remote.header(file.name), file, self.manifest)
        return self

    def save_pretrained(self, save_directory: str | Path, *, subfolder: str = "fwdattr") -> Path:
        """Copy the bank to `save_directory/subfolder`, atomically; returns that folder."""
        target = Path(save_directory) / subfolder
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == self.folder.resolve():
            return target
        for file in self.manifest.files:
            copy_atomically(self.path(file), target / file.name)
        write_atomically(target / MANIFEST, self.manifest.to_json())
        _sweep(target, self.manifest)
        return target

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Put the bank into a repository, beside the model that it belongs to, in one commit; see `push.push`.

        Returns:
            The address of the commit, or of the pull request.
        """
        return push(self.manifest, [(file, self.path(file)) for file in self.manifest.files], repo_id, **how)

    def __len__(self) -> int:
        """Number of rows."""
        return self.manifest.dataset.rows

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Compare a tokenizer's vocabulary with that of the training set, where both are known.

        Raises:
            MismatchError: they differ.
        """
        check_tokenizer(self.manifest, tokenizer)

    def check_model(self, model: nn.Module, allow_mismatch: Sequence[str] = ()) -> Parameters:
        """The responding parameters in a live model, after checking that the bank belongs to it.

        Args:
            allow_mismatch: with "weights" in it, other weights under the same names and shapes are accepted.

        Raises:
            MismatchError: other names, shapes or weights; both values are named.
        """
        return check_model(self.manifest, model, allow_mismatch)

    def check_length(self, rows: int) -> None:
        """Compare a dataset's number of rows with the bank's.

        Raises:
            MismatchError: they differ.
        """
        if rows != len(self):
            raise MismatchError(f"the bank has {len(self)} rows and the dataset {rows}; pass the training set")

    def check_rows(self, hashes: Iterable[bytes], places: Sequence[int] | None = None) -> None:
        """Compare hashes of a dataset's rows, in order, with the bank's; see `response.rows.row_hashes`.

        Args:
            hashes: of all rows; a stream of them may be longer than memory.
            places (*optional*): of which rows `hashes` are, in ascending order, if not of all.

        Raises:
            MismatchError: another number of rows, or the first row that differs; or the bank does not know its rows.
        """
        if self.manifest.privacy.rows == "sources":
            raise MismatchError("the bank keeps sources only, so no dataset can be checked against it; pass none")
        if places is None and isinstance(hashes, Sized):
            self.check_length(len(hashes))
        own = (bytes(line.tolist()) for block in self.row_hashes() for line in block)
        if places is not None:
            chosen = set(places)
            own = (line for at, line in enumerate(own) if at in chosen)
        check_rows(own, hashes, places)

    @property
    def salt(self) -> bytes:
        """Key of the row hashes, 16 bytes."""
        return bytes.fromhex(self.manifest.salt)

    def probes(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(k + source probes, P), the row probes first."""
        parts = []
        for file in self._files("probes"):
            with safe_open(self.path(file), framework="pt") as shard:
                parts.append(finite(shard.get_tensor("probes").to(dtype), file.name))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def coordinates(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of rows: their ids (n,), sources (n,) with -1 for none, and coordinates (n, k) in float32."""
        for file in self._files("coordinates"):
            path = self.path(file)
            parts = (slices(path, name, _STREAM) for name in ("row_ids", "sources", "coordinates"))
            for ids, sources, block in zip(*parts, strict=True):
                if len(sources) and not -1 <= int(sources.min()) <= int(sources.max()) < len(self.manifest.sources):
                    raise BankError(f"{file.name} names sources beyond the {len(self.manifest.sources)} of bank.json")
                yield ids, sources, finite(block.float(), file.name)

    def row_hashes(self) -> Iterator[Tensor]:
        """Blocks of (n, 16) bytes."""
        for file in self._files("coordinates"):
            yield from slices(self.path(file), "row_hashes", _STREAM)

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
        if OURS.fullmatch(path.name) and path.name not in current:
            path.unlink(missing_ok=True)
