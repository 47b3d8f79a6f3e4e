"""Pushing a bank: in one commit with its card, on top of the repository as it was seen, never over another push."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import BankError
from .card import with_section
from .hub import REPOSITORY, explained
from .pages import check_pages, page_hashes
from .schema import SHARD_KINDS, SHARD_PATTERN, Manifest, Pointer, ShardFile
from .verification import MANIFEST, read_manifest, read_pointer


__all__ = ["PushOptions", "push", "remove_stale_on_hub"]

_CARD = "README.md"


@dataclass(frozen=True)
class PushOptions:
    """Options of a push.

    Attributes:
        repo_type (`str`, defaults to `model`): `dataset` for a bank in a repository of its own.
        subfolder (`str`, defaults to `fwdattr`): the bank's folder in the repository.
        pointer_in (`str`, *optional*): a model repository whose `bank.json` shall point to this bank at this commit.
        parent_commit (`str`, *optional*): the commit that the push is based on; the newest one by default.
        commit_message, private, token, revision, create_pr: as in `HfApi.upload_folder` and `create_repo`.
    """

    repo_type: str = "model"
    subfolder: str = "fwdattr"
    pointer_in: str | None = None
    parent_commit: str | None = None
    commit_message: str = "Response bank"
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False


def push(manifest: Manifest, shards: Sequence[tuple[ShardFile, Path]], repo_id: str, options: PushOptions) -> str:
    """Upload a bank; shards of an older one are deleted in the same commit, other files stay.

    A push that was cut off leaves the repository as it was. The next one uploads only what has not arrived yet.

    Args:
        manifest (`Manifest`): the content of `bank.json`, and of the card's section.
        shards: the manifest's files and their paths on disk.
        repo_id (`str`): created if there is none.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        BankError: the repository changed meanwhile, may not be written, or cannot be reached; or page hashes are not
            those of the shards.
    """
    if options.pointer_in is not None and options.create_pr:
        raise ValueError(
            f"pointer_in={options.pointer_in!r} needs the commit of the bank, which a pull request does not have yet. "
            "Leave create_pr out"
        )
    if manifest.model is not None and not REPOSITORY.fullmatch(manifest.model):
        manifest = manifest.model_copy(update={"model": None, "revision": None})  # a path on the author's machine
    _check_pages(manifest, shards)
    subfolder = options.subfolder
    files = {f"{subfolder}/{file.name}": str(path) for file, path in shards}
    branch = _Branch(HfApi(token=options.token), options)
    commit = branch.commit(repo_id, files | {f"{subfolder}/{MANIFEST}": manifest.to_json()}, manifest)
    if options.pointer_in is None:
        return str(commit.pr_url or commit.commit_url)
    pointer = Pointer.model_validate(
        {"bank_repo": repo_id, "repo_type": options.repo_type, "revision": commit.oid, "subfolder": subfolder}
    )
    beside = replace(options, repo_type="model", revision=None, parent_commit=None)
    branch = _Branch(branch.api, beside)
    commit = branch.commit(options.pointer_in, {f"{subfolder}/{MANIFEST}": pointer.to_json()}, manifest, pointer)
    return str(commit.commit_url)


def _check_pages(manifest: Manifest, shards: Sequence[tuple[ShardFile, Path]]) -> None:
    """Check the hashes by which others will verify parts of the shards; on disk they are not used."""
    stored = [(file, path) for file, path in shards if file.kind == "page_hashes"]
    for file, path in shards:
        if SHARD_KINDS[file.kind].paged:
            check_pages(path, page_hashes(stored, manifest.pages_of(file)), manifest.page_size)


def remove_stale_on_hub(
    repo_id: str, *, subfolder: str = "fwdattr", token: str | bool | None = None, revision: str | None = None
) -> list[str]:
    """Delete shards of older banks that a repository's `bank.json` does not name; return their paths.

    For a folder that is uploaded by adding files only, as Trainer does.

    Raises:
        BankError: another push happens at the same moment, or the repository cannot be reached or written.
    """
    branch = _Branch(HfApi(token=token), PushOptions(subfolder=subfolder, token=token, revision=revision))
    manifest = f"{subfolder}/{MANIFEST}"
    with explained(f"removing older shards from {repo_id}"):
        head = branch.api.repo_info(repo_id, **branch.where).sha
        listed = branch.listed(repo_id, head)
        if manifest not in listed:
            return []
        path = Path(hf_hub_download(repo_id, manifest, revision=head, token=token))
        named = [] if read_pointer(path) is not None else [file.name for file in read_manifest(path.parent).files]
        stale = _stale(listed, {f"{subfolder}/{name}" for name in named})
        if stale:
            operations = [CommitOperationDelete(path) for path in stale]
            branch.on_top_of(head, repo_id, operations, commit_message="Remove shards of an older response bank")
        return stale


def _stale(listed: Iterable[str], kept: Collection[str]) -> list[str]:
    return [path for path in listed if path not in kept and SHARD_PATTERN.fullmatch(path.rpartition("/")[2])]


class _Branch:
    """A branch of a repository of one type."""

    def __init__(self, api: HfApi, options: PushOptions):
        self.api, self.options = api, options
        self.where: dict[str, Any] = {"repo_type": options.repo_type, "revision": options.revision}

    def commit(
        self, repo_id: str, files: dict[str, str | bytes], manifest: Manifest, pointer: Pointer | None = None
    ) -> Any:
        """Add files and the card's section and delete older shards, as one commit on the parent."""
        options = self.options
        with explained(f"pushing to {repo_id}"):
            repo_id = self.api.create_repo(
                repo_id, repo_type=options.repo_type, private=options.private, exist_ok=True
            ).repo_id
            parent = options.parent_commit or self.api.repo_info(repo_id, **self.where).sha
            card = with_section(self._card(repo_id, parent), manifest, repo_id, pointer, options.subfolder)
            stale = _stale(self.listed(repo_id, parent), files)
            operations = [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                CommitOperationAdd(_CARD, card.encode()), *(CommitOperationDelete(path) for path in stale),
            ]  # fmt: skip
            how = {"commit_message": options.commit_message, "create_pr": options.create_pr}
            return self.on_top_of(parent, repo_id, operations, **how)

    def on_top_of(self, parent: str | None, repo_id: str, operations: list[Any], **how: Any) -> Any:
        """Create a commit whose parent is the one that was looked at, or none.

        Raises:
            BankError: the repository has changed since.
        """
        try:
            return self.api.create_commit(repo_id, operations, parent_commit=parent, **how, **self.where)
        except HfHubHTTPError as error:
            if error.response.status_code in (409, 412):
                raise BankError(
                    f"{repo_id} changed while the bank was being pushed (it was at {parent}). Look at the newer "
                    "commit, and push again"
                ) from error
            raise

    def listed(self, repo_id: str, commit: str | None) -> list[str]:
        """Return the paths of the files in the bank's folder at a commit."""
        try:
            items = self.api.list_repo_tree(repo_id, self.options.subfolder, **self.where | {"revision": commit})
            return [item.path for item in items if isinstance(item, RepoFile)]
        except RemoteEntryNotFoundError:
            return []

    def _card(self, repo_id: str, commit: str | None) -> str:
        where = self.where | {"revision": commit}
        try:
            path = hf_hub_download(repo_id, _CARD, token=self.options.token, **where)
            return Path(path).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:
            return ""
