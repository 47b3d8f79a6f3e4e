"""Loading of a model with its adapter from one name: at one commit, and in the precision that it was saved with."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import load_peft_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file, find_adapter_config_file

from ..bank.bank import ResponseBank
from ..bank.hub import is_repository, pinned
from ..errors import BankError
from ..models.names import canonical_name


__all__ = ["AutoModelForAttribution"]

_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
_CLASSIFIER = "ForSequenceClassification"
_HEADS = ("score", "classifier", "classification_head", "logits_proj")  # of classifiers, as transformers names them


class AutoModelForAttribution(AutoModelForCausalLM):
    """A model that remembers where it came from: the bank lies beside the adapter, not the base.

    It is a sequence classifier where the saved model or adapter is one, and a causal language model otherwise. From
    the Hub, adapter and bank are read at the commit that the name points to now, and the base model at the commit on
    which the bank was made.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `AutoModelForCausalLM.from_pretrained` does, and note where its bank is."""
        name = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if kwargs.get(key) is not None}
        if is_repository(name):
            # transformers hands down a revision that is resolved for a certain repository, perhaps another one.
            revision = kwargs.pop("revision", None)
            hub["revision"] = pinned(name, revision=getattr(revision, "initial", revision), **hub).commit
            model = _from_repository(name, hub, *args, **kwargs)
        else:
            adapter = _adapter_config(name, hub)
            kind = _saved_class(name, hub) if adapter is None else _adapter_class(name, adapter, hub, kwargs)
            model = kind.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model.attribution_source = name
        if getattr(model, "_hf_peft_config_loaded", False):
            extra = {key: kwargs[key] for key in ("subfolder",) if kwargs.get(key) is not None}
            _restore_precision(model, load_peft_weights(name, device="cpu", **hub, **extra))
            model.attribution_tokenizer = _adapter_tokenizer(name, model.config, hub | extra)
        return model


def _from_repository(name: str, hub: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load the model in a repository at the commit in `hub`; its source is the bank, or the error of opening it."""
    bank: ResponseBank | BankError
    try:
        bank = ResponseBank.from_pretrained(name, **hub)
    except BankError as error:
        bank = error  # raised by the pipeline, unless it is given another bank
    adapter = _adapter_config(name, hub)
    if adapter is None:
        model = _saved_class(name, hub).from_pretrained(name, *args, revision=hub["revision"], **kwargs)
    else:
        base, pin = adapter["base_model_name_or_path"], adapter.get("revision")
        if isinstance(bank, ResponseBank) and bank.manifest.model == base and is_repository(base):
            pin = bank.manifest.revision or pin
            kwargs.pop("config", None)  # may be of a newer commit of the base than the one that was trained on
        kind = _adapter_class(name, adapter | {"revision": pin}, hub, kwargs)
        model = kind.from_pretrained(base, *args, revision=pin, **kwargs)
        model.load_adapter(name, adapter_kwargs=dict(hub))
    model.attribution_source = bank
    return model


def _saved_class(name: str, hub: dict[str, Any]) -> Any:
    """Return the auto class of a saved model: a sequence classifier's, or else a causal language model's."""
    kinds = getattr(AutoConfig.from_pretrained(name, **hub), "architectures", None) or [""]
    return AutoModelForSequenceClassification if kinds[0].endswith(_CLASSIFIER) else AutoModelForCausalLM


def _adapter_class(name: str, adapter: Mapping[str, Any], hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Return the auto class of an adapter's model, and set the number of classes in the arguments of its loading.

    An adapter is a classifier's if its task says so, if its base model is one, or if it holds a classifier's head. Its
    files do not tell the number of classes, but its head does.

    Args:
        adapter: the adapter's configuration; its `revision` is the base model's.
        kwargs: arguments of `from_pretrained`, changed here.
    """
    heads = {
        canonical: weight.shape[0]
        for canonical, weight in ((canonical_name(key), w) for key, w in load_peft_weights(name, "cpu", **hub).items())
        if canonical.split(".")[0] in _HEADS and canonical.endswith(".weight")
    }
    if not heads and adapter.get("task_type") != "SEQ_CLS" and not _is_classifier(adapter, hub, kwargs):
        return AutoModelForCausalLM
    if heads:
        count = min(heads.values())  # a head may have several layers; the last one's outputs are the classes
        if kwargs.get("config") is None:
            kwargs.setdefault("num_labels", count)
        elif kwargs["config"].num_labels != count:
            kwargs["config"] = copy.deepcopy(kwargs["config"])
            kwargs["config"].num_labels = count
    return AutoModelForSequenceClassification


def _is_classifier(adapter: Mapping[str, Any], hub: dict[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the base model of an adapter was saved as a classifier."""
    config = kwargs.get("config")
    if config is None:
        options = hub | {"revision": adapter.get("revision") or "main"}
        options |= {"trust_remote_code": kwargs.get("trust_remote_code")}
        config = AutoConfig.from_pretrained(adapter["base_model_name_or_path"], **options)
    return (getattr(config, "architectures", None) or [""])[0].endswith(_CLASSIFIER)


def _adapter_config(name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of the adapter in a repository; None if that holds a whole model."""
    path = find_adapter_config_file(name, **hub)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _adapter_tokenizer(name: str, config: Any, hub: dict[str, Any]) -> Any:
    """Load the tokenizer that was saved with an adapter; `transformers.pipeline` would take the base model's."""
    path = cached_file(
        name, "tokenizer_config.json", **hub, _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if path is None else AutoTokenizer.from_pretrained(name, config=config, **hub)


def _restore_precision(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Restore adapter weights to the precision that they were saved in.

    On a half-precision base peft trains and saves adapters in float32; transformers loads them in the base's dtype.
    """
    for name, parameter in model.named_parameters():
        value = stored.get(canonical_name(name))
        if value is not None and value.dtype.itemsize > parameter.dtype.itemsize:
            parameter.data = value.to(parameter.device)
