"""Whether a bank belongs to what is at hand: the responding weights, the tokenizer, the rows."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ..errors import MismatchError, UnsupportedError
from ..models.fsdp import is_sharded
from ..models.parameters import Parameters
from .hub import commit_in_cache, is_repository, repository_in_cache
from .schema import Manifest


def tokenizer_hash(tokenizer: Any) -> str | None:
    """sha256 over the vocabulary, hexadecimal; None without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_tokenizer(manifest: Manifest, tokenizer: Any) -> None:
    """See `ResponseBank.check_tokenizer`."""
    known, found = manifest.dataset.tokenizer, tokenizer_hash(tokenizer)
    if known is not None and found is not None and known != found:
        raise MismatchError(
            f"the rows were tokenized with a vocabulary of sha256 {known[:16]}... and this tokenizer's is "
            f"{found[:16]}...; load the tokenizer that was saved with the model, or accept it with "
            "allow_mismatch=['tokenizer']"
        )


def check_model(manifest: Manifest, model: nn.Module, allow_mismatch: Sequence[str]) -> Parameters:
    """See `ResponseBank.check_model`."""
    if is_sharded(model):
        raise UnsupportedError("the model is sharded over ranks, where no query is read: load it in one process")
    wanted = {parameter.name: tuple(parameter.shape) for parameter in manifest.parameters}
    made_for = f"load the adapter or model that the bank was made for ({manifest.model or 'a local one'})"
    try:
        found = Parameters.of(model, ["^" + name.replace(".", r"\.") + "$" for name in wanted])
    except Exception as error:
        raise MismatchError(
            f"the bank's responding parameters, such as {next(iter(wanted))}, are not in this model; {made_for}"
        ) from error
    shapes = dict(zip(found.names, found.shapes, strict=True))
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise MismatchError(
                f"{name} has shape {shape} in the bank and {shapes.get(name, 'no place')} in the model; {made_for}"
            )
    place = {name: index for index, name in enumerate(found.names)}
    order = [place[name] for name in wanted]
    parameters = Parameters(tuple(found.live[i] for i in order), tuple(wanted), tuple(found.shapes[i] for i in order))
    weights = parameters.fingerprint(model)
    if weights != manifest.weights and "weights" not in allow_mismatch:
        raise MismatchError(
            f"the bank belongs to weights with sha256 {manifest.weights[:16]}... and the model's responding weights "
            f"have {weights[:16]}...; load the revision that the bank was made for, in the dtype it was saved in, "
            "build the bank again, or accept scores of other weights with allow_mismatch=['weights']"
        )
    return parameters


def check_rows(own: Iterable[bytes], hashes: Iterable[bytes], places: Iterable[int] | None = None) -> int:
    """Compare hashes one by one; returns how many there were on either side.

    Args:
        own, hashes: of the bank and of a dataset.
        places (*optional*): which rows they are of, 0, 1, ... by default.

    Raises:
        MismatchError: the first row that differs.
    """
    mine, theirs, count = iter(own), iter(hashes), 0
    where = iter(places) if places is not None else None
    for one in mine:
        other = next(theirs, None)
        if other is None:
            raise MismatchError(f"the dataset ends after {count} rows and the bank does not; pass the training set")
        at = count if where is None else next(where)
        if one != other:
            raise MismatchError(
                f"row {at} of the dataset is not the row that was trained on (token hash {other.hex()}, bank "
                f"{one.hex()}); pass the training set, in its order, tokenized as then"
            )
        count += 1
    if next(theirs, None) is not None:
        raise MismatchError(f"the bank has {count} rows and the dataset more; pass the training set")
    return count


def dataset_identity(dataset: Any) -> dict[str, Any]:
    """Fields of the manifest's `dataset` that the dataset knows of itself."""
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
    for address in [*(getattr(getattr(dataset, "info", None), "download_checksums", None) or {}), *_streamed(dataset)]:
        found = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", str(address))
        if found is not None:
            return found[1], found[2]
    for file in getattr(dataset, "cache_files", None) or []:
        path = str(file.get("filename", "")).replace("\\", "/")
        found = re.search(r"/([\w.-]+?)___([\w.-]+)/.+/([0-9a-f]{40})/", path)
        if found is not None and (repo := repository_in_cache(found[1], found[2], found[3])) is not None:
            return repo, found[3]
    return None, None


def _streamed(dataset: Any) -> list[Any]:
    """Addresses of the files that a `datasets.IterableDataset` reads."""
    inner: Any = getattr(dataset, "_ex_iterable", None)
    while hasattr(inner, "ex_iterable"):
        inner = inner.ex_iterable
    files = (getattr(inner, "kwargs", None) or {}).get("files") or []
    return list(files) if isinstance(files, list | tuple) else []


@contextmanager
def naming_origins(manifest: Manifest, dataset: Any) -> Iterator[None]:
    """The rows decide whether a dataset is the training set; if they differ, say where both are from.

    Raises:
        MismatchError: as raised inside, with every value that bank and dataset know and that differs.
    """
    try:
        yield
    except MismatchError as error:
        known, found = manifest.dataset.model_dump(), dataset_identity(dataset)
        differing = [
            f"{name} {known[name]} in the bank and {found[name]} here"
            for name in ("repo", "config", "split", "revision", "fingerprint")
            if known[name] is not None and found[name] is not None and known[name] != found[name]
        ]
        raise MismatchError(f"{error} ({'; '.join(differing)})" if differing else str(error)) from error


def model_identity(model: nn.Module) -> tuple[str | None, str | None]:
    """(repository of the base model, its commit), as transformers, peft and the Hub's cache remember them.

    Both None for a model that is not on the Hub: a path of somebody's machine is not published with a bank.
    """
    unwrap = getattr(model, "get_base_model", None)  # PeftModel has it
    inner = unwrap() if callable(unwrap) else model
    config = getattr(inner, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None
    if name is None or not is_repository(name):
        return None, None
    adapters = getattr(model, "peft_config", None)
    asked = [getattr(adapter, "revision", None) for adapter in adapters.values()] if isinstance(adapters, dict) else []
    said = [*asked, getattr(config, "_commit_hash", None)]
    return name, next((revision for revision in said if revision), None) or commit_in_cache(name)


def libraries() -> dict[str, str]:
    """Versions of what the bank was made with."""
    found = {}
    for name in ("hf-fwdattr", "torch", "transformers", "peft", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
