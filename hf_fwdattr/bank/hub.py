"""Banks on the Hub: pinned to one commit, downloaded and verified file by file as they are needed."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from ..errors import BankError
from .byte_ranges import ByteRanges
from .files import Header
from .schema import Pointer, ShardFile
from .verification import LARGEST_MANIFEST, MANIFEST, refuse_unknown_files


__all__ = ["REPOSITORY", "Remote", "Unreachable", "commit_in_cache", "explained", "is_repository", "pinned",
           "repository_in_cache"]  # fmt: skip


REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Remote:
    """A bank's folder in a repository at one commit.

    Attributes:
        repo (`str`): name of the repository; `repo_type` is `model` or `dataset`.
        commit (`str`): the commit that everything is read from.
        subfolder (`str`): where in the repository, "" for its root.
        token, cache_dir, local_files_only, force_download: as in `hf_hub_download`.
    """

    repo: str
    repo_type: str
    commit: str
    subfolder: str
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    @property
    def offline(self) -> bool:
        """True if only the cache may be read."""
        return self.local_files_only or constants.is_offline_mode()

    def path(self, name: str) -> str:
        """Return a file's path in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def fetch(self, name: str) -> Path:
        """Return the path of a file of the bank in the Hub's cache, downloaded if it is not there.

        Raises:
            BankError: it is not in the repository, or cannot be downloaded.
        """
        with explained(f"{self.path(name)} of {self}"):
            path = hf_hub_download(
                self.repo, self.path(name), repo_type=self.repo_type, revision=self.commit, token=self.token,
                cache_dir=self.cache_dir, local_files_only=self.local_files_only, force_download=self.force_download,
            )  # fmt: skip
        return Path(path)

    def listing(self) -> dict[str, RepoFile] | None:
        """Return the folder's files by name, with sizes and hashes; None if only the cache is read."""
        if self.offline:
            return None
        try:
            with explained(f"the list of files of {self}"):
                items = HfApi(token=self.token).list_repo_tree(
                    self.repo, self.subfolder or None, repo_type=self.repo_type, revision=self.commit
                )
                return {item.path.rpartition("/")[2]: item for item in items if isinstance(item, RepoFile)}
        except Unreachable:
            return None  # what is in the cache may be enough; every file is checked again when it is opened

    def manifest(self) -> Path:
        """Return the path of `bank.json` in the cache; one that is too large is refused before its download."""
        listed = self.listing()
        if listed is not None and MANIFEST not in listed:
            raise BankError(_absent(self))
        if listed is not None and listed[MANIFEST].size > LARGEST_MANIFEST:
            raise BankError(
                f"{MANIFEST} of {self} has {listed[MANIFEST].size} bytes. A manifest has at most "
                f"{LARGEST_MANIFEST}. Push the bank again"
            )
        return self.fetch(MANIFEST)

    def check(self, files: list[ShardFile]) -> None:
        """Compare `bank.json` with the files in the repository, before any of them is downloaded.

        Raises:
            BankError: a shard is missing, or of another size or hash.
        """
        listed = self.listing()
        if listed is None:
            return
        refuse_unknown_files(listed, [MANIFEST, *(file.name for file in files)], self)
        for file in files:
            entry = listed.get(file.name)
            if entry is None:
                raise BankError(f"{self.path(file.name)} is missing in {self}. Push the bank again")
            if entry.size != file.size:
                raise BankError(
                    f"{self.path(file.name)} has {entry.size} bytes in {self} and bank.json says {file.size}. Push "
                    "the bank again"
                )
            if entry.lfs is not None and entry.lfs.sha256 != file.sha256:
                raise BankError(
                    f"{self.path(file.name)} in {self} has sha256 {entry.lfs.sha256[:16]}... and bank.json says "
                    f"{file.sha256[:16]}.... Push the bank again"
                )

    def header(self, name: str) -> Header:
        """Return dtype and shape of every tensor in a shard, from its first bytes alone.

        Raises:
            BankError: they are no safetensors header.
        """
        with explained(f"the header of {self.path(name)} of {self}"):
            try:
                metadata = HfApi(token=self.token).parse_safetensors_file_metadata(
                    self.repo, self.path(name), repo_type=self.repo_type, revision=self.commit
                )
                return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in metadata.tensors.items()}
            except (SafetensorsParsingError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise BankError(
                    f"{self.path(name)} of {self} has no sound safetensors header ({_first(error)}). Push it again"
                ) from error

    def is_cached(self, name: str) -> bool:
        """Return whether the whole file is in the Hub's cache, where it may be used."""
        path = try_to_load_from_cache(self.repo, self.path(name), self.cache_dir, self.commit, self.repo_type)
        return isinstance(path, str) and not self.force_download

    def partial_path(self, file: ShardFile) -> Path:
        """Return the path, in the repository's folder of the Hub's cache, for the parts of a shard that were read."""
        cache = Path(self.cache_dir or constants.HF_HUB_CACHE)
        repository = repo_folder_name(repo_id=self.repo, repo_type=self.repo_type)
        return cache / repository / "fwdattr-pages" / file.sha256 / file.name

    def byte_ranges(self, name: str) -> Callable[[int, int, Callable[[bytes], None]], None]:
        """Return a function that reads a range of bytes of a file; see `ByteRanges.read`.

        It raises BankError where the range cannot be downloaded, and RangesUnsupported.
        """
        url = hf_hub_url(self.repo, self.path(name), repo_type=self.repo_type, revision=self.commit)
        ranges = ByteRanges(url, self.token)

        def read(start: int, end: int, take: Callable[[bytes], None]) -> None:
            wanted = f"the range of bytes {start} to {end} of {self.path(name)} of {self}"
            if self.offline:
                raise Unreachable(
                    f"{wanted} is not in the cache, and only the cache may be read. Connect, or download it once "
                    "before going offline"
                )
            with explained(wanted):
                ranges.read(start, end, take)

        return read

    def follow(self, pointer: Pointer) -> "Remote":
        """Return the place that a pointer leads to, with the same token and cache."""
        return replace(
            self, repo=pointer.bank_repo, repo_type=pointer.repo_type, commit=pointer.revision,
            subfolder=pointer.subfolder,
        )  # fmt: skip


class Unreachable(BankError):
    """The Hub gave no answer."""


def is_repository(name: str) -> bool:
    """Return whether a name could be a repository's, and is no folder on this machine."""
    return not Path(name).exists() and REPOSITORY.fullmatch(name) is not None


def pinned(
    repo: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    subfolder: str = "fwdattr",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Remote:
    """Return a bank's place in a repository, with a branch or tag resolved to the commit it now points to.

    Raises:
        BankError: no such repository or revision, or the Hub cannot be reached.
    """
    with explained(f"{repo}" + (f" at {revision}" if revision else "")):
        resolved = HfApi().resolve_revision(
            repo, repo_type=repo_type, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
            token=token,
        )  # fmt: skip
    return Remote(repo, repo_type, resolved.resolved, subfolder, token, cache_dir, local_files_only, force_download)


def commit_in_cache(name: str) -> str | None:
    """Return the commit to which a repository's default branch was last resolved; None if it never was."""
    if not is_repository(name):
        return None
    try:
        return str(HfApi().resolve_revision(name, local_files_only=True).resolved)
    except (RevisionResolutionError, HFValidationError):
        return None


def repository_in_cache(owner: str, name: str, commit: str) -> str | None:
    """Return the dataset repository whose commit was downloaded, by a name that lost its capitals and underscores."""
    for folder in Path(constants.HF_HUB_CACHE).glob(f"datasets--{owner}--*/snapshots/{commit}"):
        exact = folder.parents[1].name.split("--", 2)[2]
        if exact.lower().replace("_", "") == name.lower().replace("_", ""):
            return f"{owner}/{exact}"
    return None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise the Hub's errors as this package's, with their cure."""
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        raise Unreachable(
            f"{what} is not in the cache and the Hub cannot be asked ({_first(error)}). Connect, or download it once "
            "before going offline"
        ) from error
    except RevisionNotFoundError as error:
        raise BankError(f"{what}: there is no such revision. Name a branch, tag or commit that exists") from error
    except EntryNotFoundError as error:
        raise BankError(f"no bank: {what} does not exist. Push one with ResponseBank.push_to_hub") from error
    except RepositoryNotFoundError as error:
        raise BankError(
            f"{what}: no such repository, or it is private. Check the name, and log in or pass token="
        ) from error
    except HfHubHTTPError as error:
        raise BankError(
            f"{what}: the Hub answered {error.response.status_code} ({_first(error)}). Try again later"
        ) from error
    except HFValidationError as error:
        raise BankError(f"{what}: {_first(error)}") from error
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError and not isinstance(error.__cause__, httpx2.HTTPError):
            raise
        raise Unreachable(f"{what}: the connection failed ({_first(error)}). Try again") from error


def _first(error: Any) -> str:
    """Return the first line of an error's text, without the name of the server."""
    lines = str(error).strip().splitlines()
    return re.sub(r"https?://[^/\s]+", "", lines[0]) if lines else type(error).__name__


def _absent(remote: Remote) -> str:
    return (
        f"no bank in {remote}: there is no {remote.path(MANIFEST)}. Train with ResponseCallback and push, or name the "
        "repository that has one"
    )
