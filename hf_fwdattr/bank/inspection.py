"""Inspection of a bank without torch: where it is, what its manifest says, whether its shards agree with it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import BankError
from .byte_ranges import RangesUnsupported
from .files import FileMark, StoredTensor, file_mark, inside, read_layout
from .hub import Remote, is_repository, pinned
from .pages import Lines, PartialShard, line_spans, page_hashes, read_lines
from .printable import printable
from .schema import Manifest, ShardFile
from .verification import (
    MANIFEST,
    check_header,
    check_layout,
    check_shard,
    names_in,
    read_manifest,
    read_pointer,
    refuse_unknown_files,
)


__all__ = ["BankFiles", "inspect_bank"]

logger = logging.getLogger(__name__)


class BankFiles:
    """The files of a bank, in a folder or on the Hub, each verified before it is used.

    Attributes:
        folder (`Path`): the folder of `bank.json`; shards may still be on the Hub.
        remote (`Remote`, *optional*): the repository and commit that the bank is read from.
        manifest (`Manifest`): the content of `bank.json`.
    """

    def __init__(self, folder: str | Path, verify: bool = True, remote: Remote | None = None):
        self.folder, self.remote = Path(folder), remote
        self.manifest: Manifest = read_manifest(self.folder)
        self._verify = verify
        self._verified: dict[str, tuple[Path, FileMark]] = {}
        self._partial: dict[str, PartialShard] = {}
        check_layout(self.manifest)
        for note in self.manifest.notes:
            logger.warning("%s: scores from this bank may be wrong: %s", self.folder, printable(note))
        if remote is not None:  # shards are downloaded and verified when they are needed
            remote.check(self.manifest.files)
            return
        for file in self.manifest.files:
            self.path(file)
        refuse_unknown_files(names_in(self.folder), self._names(), self.folder)

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
    ) -> Self:
        """Open the bank of a model: of a folder, or of a repository on the Hub.

        From the Hub only `bank.json` is read at once, everything at the commit that `revision` points to now. Shards
        are downloaded when they are needed, each verified before it is used.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a model's folder, a bank's own folder, or a repository.
            subfolder (`str`, defaults to `fwdattr`): the bank's folder inside; "" for the root.
            revision (`str`, *optional*): branch, tag or commit.
            repo_type (`str`, defaults to `model`): `dataset` for a bank in a dataset repository of its own.
            token, cache_dir, local_files_only, force_download: as in `hf_hub_download`.

        Raises:
            BankError: there is no bank, it is damaged, or the Hub cannot be reached.
        """
        options: dict[str, Any] = {
            "revision": revision, "repo_type": repo_type, "token": token, "cache_dir": cache_dir,
            "local_files_only": local_files_only, "force_download": force_download,
        }  # fmt: skip
        name = str(pretrained_model_name_or_path)
        if is_repository(name):
            remote = pinned(name, subfolder=subfolder, **options)
            path = remote.manifest()
        else:
            folder = Path(pretrained_model_name_or_path)
            path = next((p for p in (folder / MANIFEST, folder / subfolder / MANIFEST) if p.is_file()), folder)
            if path == folder or (pointer := read_pointer(path)) is None:
                return cls(folder / subfolder if path == folder else path.parent)
            options |= {"repo_type": pointer.repo_type, "revision": pointer.revision}
            remote = pinned(pointer.bank_repo, **options)
        if (pointer := read_pointer(path)) is not None:
            remote = remote.follow(pointer)
            path = remote.manifest()
        return cls(path.parent, remote=remote)

    def path(self, file: ShardFile) -> Path:
        """Return a shard's path on disk, downloaded if it must be, and verified once, or again if the file changed.

        Raises:
            BankError: it is not what `bank.json` says.
        """
        known = self._verified.get(file.name)
        if known is not None and file_mark(known[0]) == known[1]:
            return known[0]
        path = inside(self.folder, file.name)
        if self.remote is not None:
            path = self.remote.fetch(file.name)
        mark = file_mark(path)
        try:
            check_shard(path, file, self.manifest, self._verify)
        except BankError as error:
            if known is None:
                raise
            raise BankError(
                f"{self.folder}: the bank was replaced, changed or removed while it was open ({error}). Scores of two "
                "banks do not mix. Open it again, and make the pipeline anew"
            ) from error
        self._verified[file.name] = path, mark
        return path

    def read_lines(self, file: ShardFile, lines: Sequence[int]) -> dict[str, tuple[StoredTensor, Lines]]:
        """Read lines of every tensor in a shard of a paged kind.

        From the Hub only the pages that hold them are downloaded, each verified before it is used and kept in the
        cache; but the whole shard where all of its lines are wanted, or where the server answers with whole files.

        Args:
            lines: counted from the shard's first, in any order.

        Returns:
            By name, the tensor and the bytes of its lines, (lines, bytes of a line) uint8.

        Raises:
            BankError: a page or the shard is not what the bank says, or cannot be downloaded.
        """
        partial = self._partial_shard(file) if len(set(lines)) < file.lines else None
        if partial is not None:
            try:
                layout = partial.layout
                header = {name: (tensor.dtype, tensor.shape) for name, tensor in layout.items()}
                check_header(header, file, self.manifest)
                partial.ensure(line_spans(layout.values(), sorted(set(lines))))
                return {name: (tensor, read_lines(partial.path, tensor, lines)) for name, tensor in layout.items()}
            except RangesUnsupported:
                pass
        path = self.path(file)
        return {name: (tensor, read_lines(path, tensor, lines)) for name, tensor in read_layout(path).items()}

    def page_hashes(self, file: ShardFile) -> Lines:
        """Return the hashes of a shard's pages, (pages, 32) uint8.

        Raises:
            BankError: the shard that holds them is not what `bank.json` says.
        """
        stored = [(part, self.path(part)) for part in self.manifest.files_of("page_hashes")]
        return page_hashes(stored, self.manifest.pages_of(file))

    def _partial_shard(self, file: ShardFile) -> PartialShard | None:
        """Return the part of a shard that is on disk; None where the whole of it is."""
        remote = self.remote
        if remote is None or file.name in self._verified or remote.is_cached(file.name):
            return None
        if file.name not in self._partial:
            hashes, path = self.page_hashes(file), remote.partial_path(file)
            if remote.force_download:
                path.unlink(missing_ok=True)
            read = remote.byte_ranges(file.name)
            self._partial[file.name] = PartialShard(path, file, self.manifest.page_size, hashes, read)
        return self._partial[file.name]

    def inspect(self) -> Self:
        """Compare every shard's header with `bank.json`; on the Hub by range requests, without downloading a shard.

        Raises:
            BankError: a shard is not what `bank.json` says.
        """
        for file in self.manifest.files:
            if self.remote is None or self.remote.offline:
                self.path(file)
            else:
                check_header(self.remote.header(file.name), file, self.manifest)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out parts of shards, which hold locks: a copy verifies them again."""
        return self.__dict__ | {"_partial": {}}

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.manifest.dataset.rows

    def __repr__(self) -> str:
        manifest, place = self.manifest, self.remote or self.folder
        missing = f"; no gradient predictor: {manifest.predictor_missing}" if manifest.predictor_missing else ""
        missing, notes = printable(missing), "".join(f"; note: {printable(note)}" for note in manifest.notes)
        return (
            f"{type(self).__name__}({place}: {len(self):,} rows, {len(manifest.sources):,} sources, "
            f"{manifest.directions} directions of rows and {manifest.source_directions} of sources for "
            f"{manifest.size:,} parameters, {manifest.bytes / 1e6:,.1f} MB{missing}{notes})"
        )

    def _names(self) -> list[str]:
        return [MANIFEST, *(file.name for file in self.manifest.files)]


def inspect_bank(name_or_folder: str | Path, **options: Any) -> BankFiles:
    """Open a bank and compare every shard's header with `bank.json`, without importing torch.

    Args:
        name_or_folder (`str` or `Path`): as in `BankFiles.from_pretrained`, and so are the options.

    Raises:
        BankError: there is no bank, it is damaged, or the Hub cannot be reached.
    """
    return BankFiles.from_pretrained(name_or_folder, **options).inspect()
