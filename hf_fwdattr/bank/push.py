"""A bank into a repository: in one commit with its card, on top of what was there, never over somebody else's push."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import BankError
from .card import with_section
from .files import SHARD_PATTERN
from .hub import REPOSITORY, explained
from .schema import MANIFEST, File, Manifest, Pointer, read_manifest, read_pointer


_CARD = "README.md"


def push(
    manifest: Manifest,
    shards: Sequence[tuple[File, Path]],
    repo_id: str,
    *,
    repo_type: str = "model",
    subfolder: str = "fwdattr",
    pointer_in: str | None = None,
    commit_message: str = "Response bank",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
) -> str:
    """Upload a bank; the shards of an older one are deleted in the same commit, files of others stay.

    A push that was cut off leaves the repository as it was. The next one uploads only what has not arrived yet.

    Args:
        manifest (`Manifest`): `bank.json`, and what the card's section says.
        shards: the manifest's files and where they are.
        repo_id (`str`): made if there is none.
        repo_type (`str`, defaults to `model`): `dataset` for a bank in a repository of its own.
        pointer_in (`str`, *optional*): a model repository whose `bank.json` shall point to this bank at this commit.
        parent_commit (`str`, *optional*): the commit that the push is based on; the newest one by default.
        commit_message, private, token, revision, create_pr: as of `HfApi.upload_folder` and `create_repo`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        BankError: the repository changed meanwhile, is not to be written, or cannot be reached.
    """
    if pointer_in is not None and create_pr:
        raise ValueError("pointer_in needs the commit of the bank, which a pull request does not have yet")
    if manifest.model is not None and not REPOSITORY.fullmatch(manifest.model):
        # A path of somebody's machine, as banks of version 0.1 name it.
        manifest = manifest.model_copy(update={"model": None, "revision": None})
    place = _Place(HfApi(token=token), repo_type, revision, token)
    operations = [CommitOperationAdd(f"{subfolder}/{file.name}", str(path)) for file, path in shards]
    operations.append(CommitOperationAdd(f"{subfolder}/{MANIFEST}", manifest.to_json()))
    commit = place.commit(repo_id, operations, manifest, subfolder, commit_message, private, create_pr, parent_commit)
    if pointer_in is None:
        return str(commit.pr_url or commit.commit_url)
    pointer = Pointer.model_validate(
        {"bank_repo": repo_id, "repo_type": repo_type, "revision": commit.oid, "subfolder": subfolder}
    )
    operations = [CommitOperationAdd(f"{subfolder}/{MANIFEST}", pointer.to_json())]
    place = _Place(place.api, "model", None, token)
    commit = place.commit(pointer_in, operations, manifest, subfolder, commit_message, private, False, None, pointer)
    return str(commit.commit_url)


def remove_stale_on_hub(
    repo_id: str, *, subfolder: str = "fwdattr", token: str | bool | None = None, revision: str | None = None
) -> list[str]:
    """Delete shards of older banks that a repository's `bank.json` does not name; returns their paths.

    For a folder that was uploaded by somebody who only adds files, as Trainer does.

    Raises:
        BankError: somebody else pushes at the same moment, or the repository cannot be reached or written.
    """
    place = _Place(HfApi(token=token), "model", revision, token)
    with explained(f"removing older shards from {repo_id}"):
        head = place.api.repo_info(repo_id, **place.where).sha
        listed = place.listed(repo_id, subfolder, head)
        if f"{subfolder}/{MANIFEST}" not in listed:
            return []
        path = Path(hf_hub_download(repo_id, f"{subfolder}/{MANIFEST}", revision=head, token=token))
        named = [] if read_pointer(path) is not None else [file.name for file in read_manifest(path.parent).files]
        stale = _stale(listed, {f"{subfolder}/{name}" for name in named})
        if stale:
            operations = [CommitOperationDelete(path) for path in stale]
            place.on_top_of(head, repo_id, operations, commit_message="Remove shards of an older response bank")
        return stale


def _stale(listed: Iterable[str], kept: Collection[str]) -> list[str]:
    return [path for path in listed if path not in kept and SHARD_PATTERN.fullmatch(path.rpartition("/")[2])]


class _Place:
    """A repository of a kind, at a branch."""

    def __init__(self, api: HfApi, repo_type: str, revision: str | None, token: str | bool | None):
        self.api, self.token = api, token
        self.where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}

    def commit(
        self,
        repo_id: str,
        operations: list[Any],
        manifest: Manifest,
        subfolder: str,
        message: str,
        private: bool | None,
        create_pr: bool,
        parent: str | None,
        pointer: Pointer | None = None,
    ) -> Any:
        """The files, the card's section, and the end of older shards, as one commit on `parent`."""
        with explained(f"pushing to {repo_id}"):
            made = self.api.create_repo(repo_id, repo_type=self.where["repo_type"], private=private, exist_ok=True)
            repo_id = made.repo_id
            parent = parent or self.api.repo_info(repo_id, **self.where).sha
            kept = {operation.path_in_repo for operation in operations}
            stale = _stale(self.listed(repo_id, subfolder, parent), kept)
            card = with_section(self._card(repo_id, parent), manifest, repo_id, pointer, subfolder)
            operations = [
                *operations, CommitOperationAdd(_CARD, card.encode()), *(CommitOperationDelete(path) for path in stale)
            ]  # fmt: skip
            return self.on_top_of(parent, repo_id, operations, commit_message=message, create_pr=create_pr)

    def on_top_of(self, parent: str | None, repo_id: str, operations: list[Any], **how: Any) -> Any:
        """A commit whose parent is the one that was looked at, or none.

        Raises:
            BankError: somebody was faster.
        """
        try:
            return self.api.create_commit(repo_id, operations, parent_commit=parent, **how, **self.where)
        except HfHubHTTPError as error:
            if error.response.status_code in (409, 412):
                raise BankError(
                    f"{repo_id} changed while the bank was being pushed (it was at {parent}); look at what came, "
                    "and push again"
                ) from error
            raise

    def listed(self, repo_id: str, subfolder: str, commit: str | None) -> list[str]:
        """Paths of the files in the folder at a commit."""
        where = self.where | {"revision": commit}
        try:
            items = self.api.list_repo_tree(repo_id, subfolder, **where)
            return [item.path for item in items if isinstance(item, RepoFile)]
        except RemoteEntryNotFoundError:
            return []

    def _card(self, repo_id: str, commit: str | None) -> str:
        where = self.where | {"revision": commit}
        try:
            return Path(hf_hub_download(repo_id, _CARD, token=self.token, **where)).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:
            return ""
