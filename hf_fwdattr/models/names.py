"""Which weights respond: their canonical names, and the one flat vector theta that the mathematics speaks of."""

import re


# Wrappers put their own prefix before a parameter's name; none of them is part of the weight's identity.
# `module.` is DDP's, at the very front only: further in it may be a name of the model's own.
_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod)\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# In memory an adapter weight carries its adapter's name (lora_A.default.weight); in adapter files it does not.
_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|vera_[A-Za-z_]+|ia3_[a-z]+)\.[^.]+(\.weight|\.bias)?$")
_PEFT_PREFIX = "base_model.model."


def canonical_name(name: str) -> str:
    """Name of a parameter as adapter and model files spell it, whichever wrapper the model wears.

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
