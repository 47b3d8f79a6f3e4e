"""Settings of `generate`: names that exist, and no output beyond the model's context."""

import operator
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from ..errors import QueryError
from ..models.positions import context_length


__all__ = ["check_room", "check_settings"]

_DEFAULT_NEW_TOKENS = 20  # of transformers, where neither the caller nor the model says how many

# The pipeline gives generate its inputs; these name them.
_INPUTS = {"self", "inputs", "kwargs", "input_ids", "attention_mask"}
_COUNTS = ("max_new_tokens", "min_new_tokens", "max_length", "min_length")
_CONSTRUCTION = ("bank", "readout", "precision", "allow_mismatch", "model", "tokenizer", "device")


def check_settings(settings: Mapping[str, Any], options: Iterable[str]) -> None:
    """Refuse settings that neither the pipeline nor `generate` has, and those that ask for several outputs.

    Args:
        settings: settings that are meant for `generate`.
        options: names of the pipeline's own options of a call.

    Raises:
        ValueError: a setting that does not exist, or a number of tokens that is none.
        QueryError: several outputs for one input.
    """
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"tokenizer"}
    names |= set(signature(GenerationMixin.generate).parameters) | {"assistant_tokenizer"}
    names -= _INPUTS
    for name in settings:
        if name not in names:
            raise ValueError(f"{name}={settings[name]!r}: {_cure(name, [*options, *sorted(names)])}")
    config = settings.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config: a {type(config).__name__}, which generate does not read. Pass GenerationConfig(...), "
            "or a dictionary as generate_kwargs"
        )
    for name in _COUNTS:
        _check_count(name, settings.get(name))
    count = settings.get("num_return_sequences")
    if count is None:
        count = getattr(config, "num_return_sequences", None)
    if count not in (None, 1):
        raise QueryError(
            f"num_return_sequences is more than one ({count}). A result belongs to one output. Ask for one output at "
            "a time"
        )


def _check_count(name: str, value: Any) -> None:
    if value is None or (type(value) is not bool and hasattr(value, "__index__") and operator.index(value) > 0):
        return
    if name.startswith("min") and type(value) is int and value == 0:
        return
    raise ValueError(f"{name}={value!r}: not a number of tokens. Pass a whole number, 1 or more")


def _cure(name: str, names: list[str]) -> str:
    if name in _CONSTRUCTION:
        return f"it is set when the pipeline is made, not in a call. Pass it to pipeline(..., {name}=...)"
    if name in _INPUTS:
        return "the pipeline makes generate's inputs itself. Pass token ids as the input: {'prompt_ids': [...]}"
    close = get_close_matches(name, names, 1)
    hint = f"Write {close[0]}" if close else "Leave it out"
    return f"neither the pipeline nor generate has such a setting. {hint}"


def check_room(model: Any, length: int, settings: Mapping[str, Any]) -> dict[str, int]:
    """Refuse an output that does not fit into the model's context, before it is generated.

    Args:
        length (`int`): tokens of the prompt.
        settings: all settings of `generate`.

    Returns:
        Settings to add: where neither the caller nor the model says how much to generate, `max_new_tokens`, smaller
        than transformers' default where that does not fit. Rotary positions reach beyond `max_position_embeddings`,
        to which transformers would cut its default.

    Raises:
        QueryError: the prompt fills the context, or the number of tokens that was asked for does not fit.
    """
    longest = context_length(model)
    if longest is not None and length >= longest:
        raise QueryError(
            f"the prompt has {length} tokens and the model reads at most {longest}, so no token can follow. Shorten "
            "the prompt"
        )
    for config in (settings, vars(settings.get("generation_config")) if settings.get("generation_config") else {}):
        wanted = _new_tokens(config, length)
        if wanted is not None:
            if longest is not None and wanted > longest - length:
                raise QueryError(
                    f"the prompt has {length} tokens and {wanted} are to be generated: {length + wanted} tokens and "
                    f"the model reads at most {longest}. Shorten the prompt, or pass max_new_tokens={longest - length}"
                )
            return {}
    default = _new_tokens(vars(getattr(model, "generation_config", None) or GenerationConfig()), length)
    if longest is None:
        return {"max_new_tokens": _DEFAULT_NEW_TOKENS} if default is None else {}
    room = longest - length
    return {"max_new_tokens": room} if (_DEFAULT_NEW_TOKENS if default is None else default) > room else {}


def _new_tokens(config: Mapping[str, Any], length: int) -> int | None:
    """Return how many tokens settings ask for after a prompt of some length; None if they do not say."""
    if config.get("max_new_tokens") is not None:
        return int(config["max_new_tokens"])
    return None if config.get("max_length") is None else int(config["max_length"]) - length
