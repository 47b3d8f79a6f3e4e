"""Names of weights: canonical names, independent of wrappers and adapters, and the parts of LoRA weights' names."""

import re
from typing import Any

from torch import nn


__all__ = ["adapter_of", "adapter_parts", "base_model", "canonical_name", "is_lora_weight"]

# Wrappers put their own prefix before a parameter's name; none of them is part of the weight's identity.
# `module.` is DDP's, at the very front only: further in it may be a name of the model's own.
_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod)\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PEFT_PREFIX = "base_model.model."
# In memory an adapter weight carries its adapter's name (lora_A.default.weight); in adapter files it does not.
_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|vera_[A-Za-z_]+|ia3_[a-z]+)\.[^.]+(\.weight|\.bias)?$")
_LORA_PARTS = re.compile(r"^(.*)\.lora_([A-Za-z_]+)\.([^.]+)(?:\.weight|\.bias)?$")
_SAVED_COPY = re.compile(r"^(.*)\.modules_to_save\.([^.]+)\.")
_LORA_WEIGHT = re.compile(r"\.lora_[AB]\.weight$")


def canonical_name(name: str) -> str:
    """Return a parameter's name as adapter and model files spell it, whichever wrapper the model wears.

    `model.layers.0.q_proj.lora_B.default.weight` (injected) and `base_model.model.model.layers.0.q_proj.lora_B.default.weight`
    (PeftModel) both become `base_model.model.model.layers.0.q_proj.lora_B.weight`; a weight of the base model keeps
    its name in the model file.
    """  # noqa: E501
    name = _WRAPPERS.sub("", name)
    while name.startswith(_PEFT_PREFIX):
        name = name[len(_PEFT_PREFIX) :]
    adapter = _ADAPTER.search(name)
    if adapter:
        kind, suffix = adapter.group(1), adapter.group(2) or ""
        # DoRA's magnitudes are the one adapter weight whose `.weight` is left out of the file.
        return f"{_PEFT_PREFIX}{name[: adapter.start()]}.{kind}{'' if kind == 'lora_magnitude_vector' else suffix}"
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return re.sub(r"\.(?:base_layer|original_module)\.", ".", name)


def is_lora_weight(canonical: str) -> bool:
    """Return whether a canonical name is that of a LoRA matrix A or B."""
    return bool(_LORA_WEIGHT.search(canonical))


def adapter_parts(name: str) -> tuple[str, str, str] | None:
    """Split the live name of a LoRA weight or of its module: `q_proj.lora_B.default` -> (`q_proj`, `B`, `default`)."""
    parts = _LORA_PARTS.match(name)
    return None if parts is None else (parts.group(1), parts.group(2), parts.group(3))


def adapter_of(name: str) -> tuple[str, str | None]:
    """Return the path of the layer that a live name's adapter belongs to, and the adapter; None for a plain weight."""
    parts, copy = adapter_parts(name), _SAVED_COPY.match(name)
    if parts is not None:
        return parts[0], parts[2]
    return (copy.group(1), copy.group(2)) if copy is not None else ("", None)


def base_model(model: nn.Module) -> Any:
    """Return the model inside a PeftModel; any other model as it is."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model
