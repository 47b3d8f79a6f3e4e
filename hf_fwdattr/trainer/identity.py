"""What a model and a dataset are called, as far as they say."""

import re
from typing import Any

from torch import nn

from ..bank.hub import commit_in_cache


def model_identity(model: nn.Module) -> tuple[str | None, str | None]:
    """(name or path of the base model, its commit), as transformers, peft and the Hub's cache remember them."""
    unwrap = getattr(model, "get_base_model", None)  # PeftModel has it
    inner = unwrap() if callable(unwrap) else model
    config = getattr(inner, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None
    if name is None:
        return None, None
    adapters = getattr(model, "peft_config", None)
    asked = [getattr(adapter, "revision", None) for adapter in adapters.values()] if isinstance(adapters, dict) else []
    said = [*asked, getattr(config, "_commit_hash", None)]
    return name, next((revision for revision in said if revision), None) or commit_in_cache(name)


def dataset_identity(dataset: Any) -> dict[str, Any]:
    """Fields of the manifest's `dataset` that the dataset knows of itself."""
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    repo, revision = _origin(info)
    return {
        "repo": repo or getattr(info, "dataset_name", None),
        "revision": revision,
        "config": getattr(info, "config_name", None),
        "split": None if split is None else str(split),
        "columns": list(getattr(dataset, "column_names", None) or []),
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }


def _origin(info: Any) -> tuple[str | None, str | None]:
    """(repository, commit) on the Hub from which a `datasets.Dataset` was loaded, as its downloaded files say."""
    for address in getattr(info, "download_checksums", None) or {}:
        found = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", str(address))
        if found is not None:
            return found[1], found[2]
    return None, None
