"""The response bank: directions, coordinates and row codes, read from disk or the Hub as they are needed."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BankError, MismatchError
from ..models.interrupts import uninterrupted
from ..models.parameters import TrackedParameters
from .codes import RowCodes
from .files import copy_atomically, write_atomically
from .identity import check_model, check_rows, check_tokenizer
from .inspection import BankFiles
from .push import PushOptions, push
from .schema import ShardFile
from .tensors import finite, from_lines, open_shard, slices
from .text import read_texts
from .verification import MANIFEST, remove_stale


__all__ = ["ResponseBank"]

_ROWS = 1 << 16  # rows that are read together, at most
_NUMBERS = 1 << 23  # coordinates that are read together
_BLOCK = 1 << 26  # bytes of row codes that are read together


class ResponseBank(BankFiles):
    """A verified bank of row responses, opened with [`~ResponseBank.from_pretrained`] or made by training.

    Opening reads `bank.json`; tensors are read in blocks, and downloaded, when they are asked for.

    Attributes:
        folder (`Path`): the folder of `bank.json`; shards may still be on the Hub.
        remote (`Remote`, *optional*): the repository and commit that the bank is read from.
        manifest (`Manifest`): the content of `bank.json`.
    """

    _keep: Any = None  # its end of life removes a temporary folder

    def note_quality(self, **measured: float | str) -> None:
        """Write measured figures, such as `lds=0.85`, into the `bank.json` of a local bank; the card shows them.

        Raises:
            BankError: the bank is on the Hub.
        """
        if self.remote is not None:
            raise BankError(f"the bank is in {self.remote} and cannot be changed there. Save it into a folder first")
        manifest = self.manifest.model_copy(update={"quality": self.manifest.quality | measured})
        write_atomically(self.folder / MANIFEST, manifest.to_json())
        self.manifest = manifest

    def save_pretrained(self, save_directory: str | Path, *, subfolder: str = "fwdattr") -> Path:
        """Copy the bank to `save_directory/subfolder`, atomically; return that folder."""
        target = Path(save_directory) / subfolder
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() == self.folder.resolve():
            return target
        for file in self.manifest.files:
            copy_atomically(self.path(file), target / file.name)
        write_atomically(target / MANIFEST, self.manifest.to_json())
        remove_stale(target, self._names())
        return target

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the bank into a repository, next to the model that it belongs to, in one commit.

        Args:
            options: those of `bank.push.PushOptions`: `repo_type`, `subfolder`, `pointer_in`, `commit_message`,
                `private`, `token`, `revision`, `create_pr`, `parent_commit`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            BankError: the repository changed meanwhile, may not be written, or cannot be reached.
        """
        shards = [(file, self.path(file)) for file in self.manifest.files]
        return push(self.manifest, shards, repo_id, PushOptions(**options))

    @property
    def salt(self) -> bytes:
        """Key of the row hashes, 16 bytes."""
        return bytes.fromhex(self.manifest.salt)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Compare a tokenizer with that of the training set, where both are known: all that decides about token ids.

        Raises:
            MismatchError: they differ.
        """
        check_tokenizer(self.manifest, tokenizer)

    def check_model(self, model: nn.Module, allow_mismatch: Sequence[str] = ()) -> TrackedParameters:
        """Return the tracked parameters in a live model, after checking that the bank belongs to it.

        Args:
            allow_mismatch: with "weights" in it, other weights under the same names and shapes are accepted.

        Raises:
            MismatchError: other names, shapes or weights; both values are named.
            UnsupportedError: the model's weights are sharded over processes.
        """
        return check_model(self.manifest, model, allow_mismatch)

    def check_length(self, rows: int) -> None:
        """Compare a dataset's number of rows with the bank's.

        Raises:
            MismatchError: they differ.
        """
        if rows != len(self):
            raise MismatchError(f"the bank has {len(self)} rows and the dataset {rows}. Pass the training set")

    def check_rows(self, hashes: Iterable[bytes], row_indices: Sequence[int] | None = None) -> None:
        """Compare hashes of a dataset's rows, in order, with the bank's; see `bank.hashing.row_hashes`.

        Args:
            hashes: of all rows; a stream of them may be longer than memory.
            row_indices (*optional*): the rows that `hashes` belong to, in ascending order, if not all.

        Raises:
            MismatchError: another number of rows, or the first row that differs; or the bank has no row hashes.
        """
        if self.manifest.privacy.rows == "sources":
            raise MismatchError("the bank keeps sources only, so no dataset can be checked against it. Pass none")
        if row_indices is None and isinstance(hashes, Sized):
            self.check_length(len(hashes))
        stored = (bytes(line.tolist()) for block in self.row_hashes() for line in block)
        if row_indices is not None:
            chosen = set(row_indices)
            stored = (line for index, line in enumerate(stored) if index in chosen)
        check_rows(stored, hashes, row_indices)

    def directions(self, dtype: torch.dtype = torch.float32, lines: slice = slice(None)) -> Tensor:
        """(k + source directions, P), the row directions first; only shards that hold some of `lines` are downloaded.

        Args:
            lines (`slice`): a range of them, without a step; all by default.
        """
        start, end, _ = lines.indices(self.manifest.directions + self.manifest.source_directions)
        parts = [torch.zeros(0, self.manifest.size, dtype=dtype)]
        for file in self.manifest.files_of("directions"):
            first, last = max(start - file.first, 0), min(end - file.first, file.lines)
            if first < last:
                with open_shard(self.path(file)) as shard:
                    if self.manifest.dtype == "int8":
                        part = self._codes_in(shard, file, slice(first, last), 8).decode().to(dtype)
                    else:
                        part = finite(shard.get_slice("directions")[first:last].to(dtype), file.name)
                    parts.append(part)
        return torch.cat(parts) if len(parts) > 2 else parts[-1]

    def coordinates(self, checked: bool = True) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield blocks of rows: ids (n,), sources (n,) with -1 for none, and coordinates (n, k) in float32.

        Args:
            checked (`bool`, defaults to `True`): refuse values that are not finite. That takes many times as long as
                a product with them, which shows the same: what comes of such a value is not finite either.
        """
        start = 0
        for file, parts in self._row_blocks("row_ids", "sources", *self._coordinate_names):
            ids, sources, block = parts[:3]
            self._check_sources(sources, file)
            values = self._dense(parts[2:], start)
            start += len(block)
            yield ids, sources, finite(values, file.name) if checked else values

    def stored_coordinates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield coordinates (n, k) as they are stored, and in 8 bits their scales (n,), else none, shard by shard.

        They are mapped from disk: memory is taken only by what is looked at, and can be had back by the system.
        """
        for file in self.manifest.files_of("coordinates"):
            with open_shard(self.path(file)) as shard:
                parts = [shard.get_tensor(name) for name in self._coordinate_names]
                yield parts[0], parts[1] if len(parts) > 1 else torch.zeros(0)

    def outside(self) -> Tensor:
        """(rows,), float32: norm of every response's part outside the directions, in the metric 1 / D; or empty."""
        if not self.manifest.error_variances:
            return torch.zeros(0)
        return torch.cat([finite(part, file.name) for file, (part,) in self._row_blocks("outside")])

    def row_labels(self, row_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (n,) and sources (n,), -1 for none, of these rows, read one by one."""
        ids, sources = torch.zeros(len(row_indices), dtype=torch.int64), torch.full((len(row_indices),), -1)
        for file in self.manifest.files_of("coordinates"):
            inside = ((row_indices >= file.first) & (row_indices < file.first + file.lines)).nonzero().flatten()
            if len(inside):
                with open_shard(self.path(file)) as shard:
                    lines = row_indices[inside] - file.first
                    ids[inside] = shard.get_tensor("row_ids")[lines]
                    sources[inside] = shard.get_tensor("sources")[lines].long()
                self._check_sources(sources[inside], file)
        return ids, sources

    def _check_sources(self, sources: Tensor, file: ShardFile) -> None:
        count = len(self.manifest.sources)
        if len(sources) and not -1 <= int(sources.min()) <= int(sources.max()) < count:
            raise BankError(f"{file.name} names sources beyond the {count} of bank.json. Build the bank again")

    @property
    def _coordinate_names(self) -> list[str]:
        return ["coordinates"] + ["scales"] * (self.manifest.coordinates_dtype == "int8")

    def _row_blocks(self, *names: str) -> Iterator[tuple[ShardFile, tuple[Tensor, ...]]]:
        """Yield blocks of rows of some tensors in the shards of coordinates."""
        width = max(1, min(_ROWS, _NUMBERS // self.manifest.directions))
        for file in self.manifest.files_of("coordinates"):
            path = self.path(file)
            for parts in zip(*(slices(path, name, width) for name in names), strict=True):
                yield file, parts

    def _dense(self, parts: tuple[Tensor, ...], start: int) -> Tensor:
        """Return coordinates (n, k) in float32 as they stand for, from what is stored of the rows from `start` on."""
        values = parts[0].float()
        if self.manifest.directions_are_rows:
            dense = torch.zeros(len(values), self.manifest.directions)
            dense[torch.arange(len(values)), torch.arange(start, start + len(values))] = values[:, 0]
            return dense
        if self.manifest.coordinates_dtype == "int8":
            values *= torch.tensor(self.manifest.coordinate_scales)
            values *= parts[1][:, None]
        return values

    def row_hashes(self) -> Iterator[Tensor]:
        """Yield blocks of (n, 16) bytes."""
        for file in self.manifest.files_of("coordinates"):
            yield from slices(self.path(file), "row_hashes", _ROWS)

    def row_codes(self) -> Iterator[RowCodes]:
        """Yield blocks of row codes, in order; none if the bank does not keep them."""
        manifest = self.manifest
        width = max(1, 8 * _BLOCK // max(manifest.size * manifest.row_code_bits, 1))
        for file in manifest.files_of("row_codes"):
            path = self.path(file)
            for codes, scales in zip(slices(path, "codes", width), slices(path, "scales", width), strict=True):
                scales = finite(scales, file.name)
                yield RowCodes(codes, scales, manifest.row_code_bits, manifest.size, self.code_weights)

    def codes_of(self, row_indices: Sequence[int]) -> RowCodes:
        """Return the codes of these rows, in this order.

        Raises:
            BankError: the bank keeps no code of one of them.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # lines of the result, codes, scales
        missing = dict(enumerate(row_indices))  # line of the result -> row
        for file in self.manifest.files_of("row_codes"):
            in_shard = {at: row - file.first for at, row in missing.items() if 0 <= row - file.first < file.lines}
            if not in_shard:
                continue
            stored = self.read_lines(file, list(in_shard.values()))
            codes, scales = (from_lines(*stored[name]) for name in ("codes", "scales"))
            parts.append((torch.tensor(list(in_shard)), codes, finite(scales, file.name)))
            missing = {at: row for at, row in missing.items() if at not in in_shard}
        if missing:
            row = next(iter(missing.values()))
            raise BankError(f"the bank keeps no code of row {row}. Build it with a larger responses_budget")
        order = torch.cat([part[0] for part in parts]).argsort()
        codes, scales = (torch.cat([part[at] for part in parts])[order] for at in (1, 2))
        return RowCodes(codes, scales, self.manifest.row_code_bits, self.manifest.size, self.code_weights)

    def decode_rows(self, row_indices: Sequence[int]) -> Tensor:
        """(rows, P), float32: the responses of these rows, decoded from their codes, in this order.

        From the Hub only the parts of shards that hold these rows are downloaded, unless all rows are asked for.

        Raises:
            BankError: the bank keeps no code of one of them.
        """
        if not len(row_indices):
            return torch.zeros(0, self.manifest.size)
        return self.codes_of(row_indices).decode()

    def _codes_in(self, shard: Any, file: ShardFile, lines: slice, bits: int) -> RowCodes:
        codes, scales = (shard.get_slice(name)[lines] for name in ("codes", "scales"))
        return RowCodes(codes, finite(scales, file.name), bits, self.manifest.size)

    def error_projections(self) -> dict[str, Tensor]:
        """Matrices of the gradient predictor, (d, out) in float32, by canonical path of the layer."""
        return {name: tensor.float() for name, tensor in self._tensors_of("error_projections").items()}

    def derivative_regression(self) -> dict[str, Tensor]:
        """Tensors of the regression of derivatives; empty without one. See `gradients.derivative_regression`."""
        return self._tensors_of("derivative_regression")

    def _tensors_of(self, kind: str) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for file in self.manifest.files_of(kind):
            with open_shard(self.path(file)) as shard:
                result |= {name: finite(shard.get_tensor(name), file.name) for name in shard.keys()}  # noqa: SIM118
        return result

    @cached_property
    def code_weights(self) -> Tensor | None:
        """(P,) that the numbers of row codes were multiplied with; None without codes."""
        return self._single("code_weights")

    @cached_property
    def _averaged_weights(self) -> Tensor | None:
        return self._single("averaged_weights")

    def _single(self, kind: str) -> Tensor | None:
        """Read a kind that has one shard with one tensor of the same name."""
        for file in self.manifest.files_of(kind):
            with open_shard(self.path(file)) as shard:
                return finite(shard.get_tensor(kind), file.name)
        return None

    @contextmanager
    def query_weights(self, model: nn.Module, parameters: TrackedParameters) -> Iterator[None]:
        """Give the model the weights at which queries are evaluated, for as long as the context lasts.

        These are its own, or with `averaging="trajectory"` the mean weights that the bank keeps.

        Args:
            parameters (`TrackedParameters`): those that `check_model` returned for this model.
        """
        weights = self._averaged_weights
        if weights is None:
            yield
            return
        tensors = parameters.tensors(model)
        originals = [tensor.detach().clone() for tensor in tensors]
        try:
            parameters.write(model, weights)
            yield
        finally:
            with uninterrupted(), torch.no_grad():
                for tensor, value in zip(tensors, originals, strict=True):
                    tensor.copy_(value)

    def texts(self, row_indices: Sequence[int]) -> list[str]:
        """Return the text of these rows; only shards that hold some of them are downloaded.

        Raises:
            BankError: the bank was made without `include_text`, or a shard is damaged.
        """
        if not self.manifest.privacy.text:
            raise BankError("the bank holds no text of its rows. Pass the training set as dataset=")
        shards = [(file, partial(self.path, file)) for file in self.manifest.files_of("text")]
        return read_texts(shards, row_indices)
