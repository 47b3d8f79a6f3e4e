"""Identity of a model, a tokenizer and a dataset: what a bank notes of them, and the checks against it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ..errors import MismatchError, UnsupportedError
from ..models.fsdp import is_sharded
from ..models.names import base_model
from ..models.parameters import TrackedParameters
from .hub import commit_in_cache, is_repository, repository_in_cache
from .model_state import check_forward_pass
from .schema import Manifest
from .tokenizer_identity import tokenizer_hash, tokenizer_parts


__all__ = [
    "check_model", "check_rows", "check_tokenizer", "dataset_identity", "libraries", "model_identity",
    "naming_origins", "tokenizer_hash",
]  # fmt: skip


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that a bank is made with."""
    versions = {}
    for name in ("hf-fwdattr", "torch", "transformers", "peft", "accelerate", "datasets"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def model_identity(model: nn.Module) -> tuple[str | None, str | None]:
    """(repository of the base model, its commit), as transformers, peft and the Hub's cache remember them.

    Both are None for a model that is not on the Hub: a path on the author's machine is not published with a bank.
    """
    config = getattr(base_model(model), "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None
    if name is None or not is_repository(name):
        return None, None
    adapters = getattr(model, "peft_config", None)
    adapters = adapters.values() if isinstance(adapters, dict) else []
    revisions = [*(getattr(adapter, "revision", None) for adapter in adapters), getattr(config, "_commit_hash", None)]
    return name, next((revision for revision in revisions if revision), None) or commit_in_cache(name)


def dataset_identity(dataset: Any) -> dict[str, Any]:
    """Return the fields of the manifest's `dataset` that the dataset itself knows."""
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    repo, revision = _origin(dataset)
    return {
        "repo": repo or getattr(info, "dataset_name", None),
        "revision": revision,
        "config": getattr(info, "config_name", None),
        "split": None if split is None else str(split),
        "columns": list(getattr(dataset, "column_names", None) or []),
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }


def _origin(dataset: Any) -> tuple[str | None, str | None]:
    """(repository, commit) on the Hub from which a dataset was loaded.

    A `datasets.Dataset` was prepared in a folder named after both, `owner___name/config/version/commit`; the name is
    spelled there as a module would be, so the Hub's own cache is asked for its real one. A stream knows its files.
    """
    checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    for address in [*checksums, *_stream_files(dataset)]:
        match = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", str(address))
        if match is not None:
            return match[1], match[2]
    for file in getattr(dataset, "cache_files", None) or []:
        path = str(file.get("filename", "")).replace("\\", "/")
        match = re.search(r"/([\w.-]+?)___([\w.-]+)/.+/([0-9a-f]{40})/", path)
        if match is not None and (repo := repository_in_cache(match[1], match[2], match[3])) is not None:
            return repo, match[3]
    return None, None


def _stream_files(dataset: Any) -> list[Any]:
    """Return the addresses of the files that a `datasets.IterableDataset` reads."""
    inner: Any = getattr(dataset, "_ex_iterable", None)
    while hasattr(inner, "ex_iterable"):
        inner = inner.ex_iterable
    files = (getattr(inner, "kwargs", None) or {}).get("files") or []
    return list(files) if isinstance(files, list | tuple) else []


def check_model(manifest: Manifest, model: nn.Module, allow_mismatch: Sequence[str]) -> TrackedParameters:
    """Find the manifest's tracked parameters in a model; see `ResponseBank.check_model`."""
    if is_sharded(model):
        raise UnsupportedError("the model is sharded over processes, where no query is read. Load it in one process")
    wanted = {parameter.name: tuple(parameter.shape) for parameter in manifest.parameters}
    cure = f"Load the adapter or model that the bank was made for ({manifest.model or 'a local one'})"
    try:
        tracked = TrackedParameters.of(model, ["^" + name.replace(".", r"\.") + "$" for name in wanted])
    except Exception as error:
        raise MismatchError(
            f"the bank's tracked parameters, such as {next(iter(wanted))}, are not in this model. {cure}"
            + f" ({error})" * ("several adapters" in str(error))
        ) from error
    shapes = dict(zip(tracked.names, tracked.shapes, strict=True))
    for name, shape in wanted.items():
        if name not in shapes:
            raise MismatchError(f"{name} has shape {shape} in the bank and is not in the model. {cure}")
        if shapes[name] != shape:
            raise MismatchError(f"{name} has shape {shape} in the bank and {shapes[name]} in the model. {cure}")
    index = {name: index for index, name in enumerate(tracked.names)}
    order = [index[name] for name in wanted]
    parameters = TrackedParameters(
        tuple(tracked.live[i] for i in order), tuple(wanted), tuple(tracked.shapes[i] for i in order)
    )
    weights = parameters.fingerprint(model)
    if weights != manifest.weights and "weights" not in allow_mismatch:
        raise MismatchError(
            f"the bank belongs to weights with sha256 {manifest.weights[:16]}... and the model's tracked weights "
            f"have {weights[:16]}.... Load the revision that the bank was made for, in the dtype it was saved in, "
            "build the bank again, or accept scores of other weights with allow_mismatch=['weights']"
        )
    if "weights" not in allow_mismatch:
        check_forward_pass(manifest, model, parameters)
    return parameters


def check_tokenizer(manifest: Manifest, tokenizer: Any) -> None:
    """Compare a tokenizer with the manifest's, part by part; see `ResponseBank.check_tokenizer`."""
    expected, actual = manifest.dataset.tokenizer, tokenizer_hash(tokenizer)
    if expected is not None and actual is not None and expected != actual:
        raise MismatchError(
            f"the rows were tokenized with a vocabulary of sha256 {expected[:16]}... and this tokenizer's is "
            f"{actual[:16]}.... Load the tokenizer that was saved with the model, or accept it with "
            "allow_mismatch=['tokenizer']"
        )
    parts = tokenizer_parts(tokenizer)
    for name, stated in manifest.dataset.tokenizer_parts.items():
        if parts and parts.get(name) != stated:
            raise MismatchError(
                f"tokenizer: its {name} is not the one that the rows were tokenized with (hash {parts.get(name)}, "
                f"bank {stated}). The same text would become other tokens. Load the tokenizer that was saved with the "
                "model, or accept it with allow_mismatch=['tokenizer']"
            )


def check_rows(stored: Iterable[bytes], hashes: Iterable[bytes], row_indices: Iterable[int] | None = None) -> int:
    """Compare row hashes one by one; return how many there were on either side.

    Args:
        stored, hashes: of the bank and of a dataset.
        row_indices (*optional*): the rows they belong to, 0, 1, ... by default.

    Raises:
        MismatchError: the first row that differs, or another number of rows.
    """
    others, count = iter(hashes), 0
    indices = iter(row_indices) if row_indices is not None else None
    for expected in stored:
        actual = next(others, None)
        if actual is None:
            raise MismatchError(f"the dataset ends after {count} rows and the bank does not. Pass the training set")
        row = count if indices is None else next(indices)
        if expected != actual:
            raise MismatchError(
                f"row {row} of the dataset is not the row that was trained on (token hash {actual.hex()}, bank "
                f"{expected.hex()}). Pass the training set, in its order, tokenized in the same way"
            )
        count += 1
    if next(others, None) is not None:
        raise MismatchError(f"the bank has {count} rows and the dataset more. Pass the training set")
    return count


@contextmanager
def naming_origins(manifest: Manifest, dataset: Any) -> Iterator[None]:
    """Add to a mismatch of rows where bank and dataset come from; the rows alone decide whether there is one.

    Raises:
        MismatchError: as raised inside, with every value that bank and dataset know and that differs.
    """
    try:
        yield
    except MismatchError as error:
        expected, actual = manifest.dataset.model_dump(), dataset_identity(dataset)
        differing = [
            f"{name} {expected[name]} in the bank and {actual[name]} here"
            for name in ("repo", "config", "split", "revision", "fingerprint")
            if expected[name] is not None and actual[name] is not None and expected[name] != actual[name]
        ]
        raise MismatchError(f"{error} ({'; '.join(differing)})" if differing else str(error)) from error
