"""A model with its adapter from one name, everything at one commit, in the digits that it was saved with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

from ..bank.bank import ResponseBank
from ..bank.hub import is_repository, pinned
from ..errors import BankError
from ..models.names import canonical_name


_HUB = ("token", "cache_dir", "local_files_only", "force_download")


class AutoModelForAttribution(AutoModelForCausalLM):
    """A causal language model that remembers where it came from: the bank lies beside the adapter, not the base.

    From the Hub, adapter and bank are read at the commit that the name points to now, and the base model at the commit
    on which the bank was made.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `AutoModelForCausalLM.from_pretrained`."""
        name = str(pretrained_model_name_or_path)
        where = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
        if is_repository(name):
            # transformers hands down a revision that knows which repository it was resolved for; another's is no use.
            asked = kwargs.pop("revision", None)
            where["revision"] = pinned(name, revision=getattr(asked, "initial", asked), **where).commit
            model = _at_its_commits(name, where, *args, **kwargs)
        else:
            model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model.attribution_source = name
        if getattr(model, "_hf_peft_config_loaded", False):
            extra = {key: kwargs[key] for key in ("subfolder",) if kwargs.get(key) is not None}
            _restore_precision(model, load_peft_weights(name, device="cpu", **where, **extra))
            model.attribution_tokenizer = _tokenizer_of(name, model.config, where | extra)
        return model


def _at_its_commits(name: str, where: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The model in a repository at the commit in `where`, and as its source the bank, or what is wrong with it."""
    bank: ResponseBank | BankError
    try:
        bank = ResponseBank.from_pretrained(name, **where)
    except BankError as error:
        bank = error  # told by the pipeline, unless it is given another bank
    adapter = _adapter_of(name, where)
    if adapter is None:
        model = AutoModelForCausalLM.from_pretrained(name, *args, revision=where["revision"], **kwargs)
    else:
        base, pin = adapter["base_model_name_or_path"], adapter.get("revision")
        if isinstance(bank, ResponseBank) and bank.manifest.model == base and is_repository(base):
            pin = bank.manifest.revision or pin
            kwargs.pop("config", None)  # may be of a newer commit of the base than the one that was trained on
        model = AutoModelForCausalLM.from_pretrained(base, *args, revision=pin, **kwargs)
        model.load_adapter(name, adapter_kwargs=dict(where))
    model.attribution_source = bank
    return model


def _adapter_of(name: str, where: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of the adapter in a repository; None if that holds a whole model."""
    found = find_adapter_config_file(name, **where)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def _tokenizer_of(name: str, config: Any, where: dict[str, Any]) -> Any:
    """The tokenizer that was saved with an adapter, which `transformers.pipeline` would take from the base model."""
    found = cached_file(
        name, "tokenizer_config.json", **where, _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else AutoTokenizer.from_pretrained(name, config=config, **where)


def _restore_precision(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Give adapter weights the digits that they were saved with.

    On a half-precision base peft trains and saves adapters in float32; transformers loads them in the base's dtype.
    """
    for name, parameter in model.named_parameters():
        value = stored.get(canonical_name(name))
        if value is not None and value.dtype.itemsize > parameter.dtype.itemsize:
            parameter.data = value.to(parameter.device)
