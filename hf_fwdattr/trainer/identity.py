"""What a model, a tokenizer and a dataset are called, as far as they say."""

import hashlib
import json
from typing import Any

from torch import nn


def model_identity(model: nn.Module) -> tuple[str | None, str | None]:
    """(name or path of the base model, its commit), as transformers and peft remember them."""
    unwrap = getattr(model, "get_base_model", None)  # PeftModel has it
    inner = unwrap() if callable(unwrap) else model
    config = getattr(inner, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None
    return name, getattr(config, "_commit_hash", None)


def tokenizer_hash(tokenizer: Any) -> str | None:
    """sha256 over the vocabulary, hexadecimal; None without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def dataset_identity(dataset: Any) -> dict[str, Any]:
    """Fields of the manifest's `dataset` that the dataset knows of itself."""
    info = getattr(dataset, "info", None)
    split = getattr(dataset, "split", None)
    return {
        "repo": getattr(info, "dataset_name", None),
        "config": getattr(info, "config_name", None),
        "split": None if split is None else str(split),
        "columns": list(getattr(dataset, "column_names", None) or []),
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }
