"""What a model is called, as far as it says, and what a bank is made with."""

from importlib.metadata import PackageNotFoundError, version

from torch import nn

from ..bank.hub import commit_in_cache, is_repository
from ..bank.identity import dataset_identity as dataset_identity


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
