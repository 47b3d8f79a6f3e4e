"""The response bank: directions, coordinates, and what they belong to. It lives on disk and is read as it is needed."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import BankError, MismatchError
from ..models.parameters import Parameters
from .codes import RowCodes
from .files import (
    copy_atomically,
    finite,
    inside,
    names_in,
    refuse_unknown_files,
    remove_stale,
    slices,
    write_atomically,
)
from .hub import Remote, is_repository, pinned
from .identity import check_model, check_rows, check_tokenizer
from .push import push
from .schema import MANIFEST, File, check_layout, check_shard, check_table, read_manifest, read_pointer
from .text import read_texts


_STREAM = 1 << 16  # rows that are read together, at most
_NUMBERS = 1 << 23  # coordinates that are read together
_BLOCK = 1 << 26  # bytes of rows' own responses that are read together


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
        refuse_unknown_files(names_in(self.folder), self._names(), self.folder)
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

    def note_quality(self, **measured: float | str) -> None:
        """Write what was measured of a local bank into its `bank.json`, such as `lds=0.85`, for the card to say.

        Raises:
            BankError: the bank is on the Hub; save it here first.
        """
        if self.remote is not None:
            raise BankError(f"the bank is in {self.remote}: save it into a folder first")
        told = self.manifest.model_copy(update={"quality": self.manifest.quality | measured})
        write_atomically(self.folder / MANIFEST, told.to_json())
        self.manifest = told

    def save_pretrained(self, save_directory: str | Path, *, subfolder: str = "fwdattr") -> Path:
        """Copy the bank to `save_directory/subfolder`, atomically; returns that folder."""
        target = Path(save_directory) / subfolder
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == self.folder.resolve():
            return target
        for file in self.manifest.files:
            copy_atomically(self.path(file), target / file.name)
        write_atomically(target / MANIFEST, self.manifest.to_json())
        remove_stale(target, self._names())
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
            UnsupportedError: the model's weights are sharded over ranks.
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

    def directions(self, dtype: torch.dtype = torch.float32, lines: slice = slice(None)) -> Tensor:
        """(k + source directions, P), the row directions first; only shards that hold some of `lines` are downloaded.

        Args:
            lines (`slice`): which of them, without a step; all by default.
        """
        start, end, _ = lines.indices(self.manifest.directions + self.manifest.source_directions)
        parts = [torch.zeros(0, self.manifest.size, dtype=dtype)]
        for file in self._files("directions"):
            first, last = max(start - file.first, 0), min(end - file.first, file.lines)
            if first < last:
                with safe_open(self.path(file), framework="pt") as shard:
                    parts.append(finite(shard.get_slice("directions")[first:last].to(dtype), file.name))
        return torch.cat(parts) if len(parts) > 2 else parts[-1]

    def coordinates(self, checked: bool = True) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of rows: their ids (n,), sources (n,) with -1 for none, and coordinates (n, k) in float32.

        Args:
            checked (`bool`, defaults to `True`): refuse values that are not finite. That takes many times as long as
                a product with them, which shows the same: what comes of such a value is not finite either.
        """
        width = max(1, min(_STREAM, _NUMBERS // self.manifest.directions))
        for file in self._files("coordinates"):
            path = self.path(file)
            parts = (slices(path, name, width) for name in ("row_ids", "sources", "coordinates"))
            for ids, sources, block in zip(*parts, strict=True):
                if len(sources) and not -1 <= int(sources.min()) <= int(sources.max()) < len(self.manifest.sources):
                    raise BankError(f"{file.name} names sources beyond the {len(self.manifest.sources)} of bank.json")
                yield ids, sources, finite(block.float(), file.name) if checked else block.float()

    def row_hashes(self) -> Iterator[Tensor]:
        """Blocks of (n, 16) bytes."""
        for file in self._files("coordinates"):
            yield from slices(self.path(file), "row_hashes", _STREAM)

    def row_codes(self) -> Iterator[RowCodes]:
        """Blocks of rows' own responses, in order; none where the bank does not keep them."""
        for file in self._files("row_codes"):
            path, width = self.path(file), max(1, _BLOCK // max(self.manifest.size, 1))
            for values, steps in zip(slices(path, "codes", width), slices(path, "scales", width), strict=True):
                yield RowCodes(values, finite(steps, file.name))

    def decode_rows(self, places: Sequence[int]) -> Tensor:
        """(rows, P), float32: the own responses of the rows at these positions, in this order.

        Raises:
            BankError: the bank does not keep them.
        """
        found = torch.zeros(len(places), self.manifest.size)
        wanted = dict(enumerate(places))
        for file in self._files("row_codes"):
            here = {at: place - file.first for at, place in wanted.items() if 0 <= place - file.first < file.lines}
            if not here:
                continue
            with safe_open(self.path(file), framework="pt") as shard:
                values, steps = shard.get_slice("codes"), shard.get_slice("scales")
                for at, line in here.items():
                    row = RowCodes(values[line : line + 1], finite(steps[line : line + 1], file.name))
                    found[at] = row.decode()[0]
                    del wanted[at]
        if wanted:
            raise BankError(f"the bank keeps no response of row {next(iter(wanted.values()))}")
        return found

    def error_projections(self) -> dict[str, Tensor]:
        """Maps of errors, (d, out) in float32, by canonical path of the layer; see `synthetic.gradients`."""
        found: dict[str, Tensor] = {}
        for file in self._files("error_projections"):
            with safe_open(self.path(file), framework="pt") as shard:
                found |= {name: finite(shard.get_tensor(name).float(), file.name) for name in shard.keys()}  # noqa: SIM118
        return found

    def error_covariance(self) -> Tensor | None:
        """(rows, rows), float16: how errors of first looks go together, see `kriging`; None where it is not kept."""
        for file in self._files("error_covariance"):
            with safe_open(self.path(file), framework="pt") as shard:
                return finite(shard.get_tensor("error_covariance"), file.name)
        return None

    @cached_property
    def _weights(self) -> Tensor:
        """(P,), float32: the weights at which queries are read, where `averaging` is `trajectory`."""
        (file,) = self._files("averaged_weights")
        with safe_open(self.path(file), framework="pt") as shard:
            return finite(shard.get_tensor("averaged_weights"), file.name)

    @contextmanager
    def query_weights(self, model: nn.Module, parameters: Parameters) -> Iterator[None]:
        """The model with the weights at which its queries are read: its own, or with `averaging` `trajectory` those of the bank.

        Args:
            parameters (`Parameters`): what `check_model` gave for this model.
        """
        if self.manifest.averaging == "none":
            yield
            return
        own = [tensor.detach().clone() for tensor in parameters.tensors(model)]
        try:
            parameters.write(model, self._weights)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(parameters.tensors(model), own, strict=True):
                    tensor.copy_(value)

    def texts(self, places: Sequence[int]) -> list[str]:
        """Text of the rows at these positions; only shards that hold some of them are downloaded.

        Raises:
            BankError: the bank was made without `include_text`, or a shard is damaged.
        """
        if not self.manifest.privacy.text:
            raise BankError("the bank holds no text of its rows; pass the training set as dataset=")
        return read_texts([(file, partial(self.path, file)) for file in self._files("text")], places)

    def _names(self) -> list[str]:
        return [MANIFEST, *(file.name for file in self.manifest.files)]

    def _files(self, kind: str) -> list[File]:
        return [file for file in self.manifest.files if file.kind == kind]
