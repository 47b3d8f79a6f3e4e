"""Identity of a model and a tokenizer: whatever changes a forward pass, or a text's tokens, is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from tokenizers import normalizers, pre_tokenizers, processors

from hf_fwdattr import ResponseBank, Scorer
from hf_fwdattr.bank.model_state import describe_forward_pass
from hf_fwdattr.bank.tokenizer_identity import tokenizer_hash, tokenizer_parts
from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.errors import MismatchError, UnsupportedError
from hf_fwdattr.models.parameters import TrackedParameters
from tests.bank.test_bank import ROWS, SOURCES, K, described, parts
from tests.helpers.cases import adapted, gpt2, llama
from tests.helpers.runs import queries, tokenizer


def belonging(folder: Path, model: Any, **changes: Any) -> ResponseBank:
    """Write a bank that belongs to a model and a tokenizer."""
    parameters = TrackedParameters.of(model)
    shapes = [{"name": n, "shape": list(s)} for n, s in zip(parameters.names, parameters.shapes, strict=True)]
    tensors = parts() | {"directions": [torch.randn(K, parameters.size), torch.zeros(SOURCES, parameters.size)]}
    fields = described(
        parameters=shapes, weights=parameters.fingerprint(model),
        forward_pass=describe_forward_pass(model, parameters),
        dataset={
            "rows": ROWS, "tokenizer": tokenizer_hash(tokenizer()), "tokenizer_parts": tokenizer_parts(tokenizer())
        },
    )  # fmt: skip
    return write_bank(folder, BankContents(fields | changes, **tensors))


def small(dtype: torch.dtype = torch.float32) -> Any:
    return adapted(gpt2(dtype), target_modules=["c_attn", "c_proj"]).eval()


def second_adapter(model: Any) -> None:
    """Switch a second adapter on, beside the first and on other layers."""
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.eval()


def scaled(model: Any) -> None:
    next(m for m in model.modules() if hasattr(m, "scale_layer")).scale_layer(0.5)


def trained_base(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().transformer.ln_f.weight.add_(0.05)


def trained_adapter(model: Any) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(1.1)


def trained_tracked(model: Any) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.1)


def added_ia3(model: Any) -> None:
    settings = IA3Config(target_modules=["c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True)
    inject_adapter_in_model(settings, model.get_base_model(), "other")
    model.eval()


def written_by_data(model: Any) -> None:
    """A write that torch does not count."""
    model.get_base_model().transformer.wte.weight.data.mul_(1.01)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "second adapter": (
        second_adapter,
        r"c_fc.*scaled by \S+ and were scaled by 0 for .*Load the base model and the adapters",
    ),
    "scale_layer": (scaled, r"its adapters are scaled by \S+ and were scaled by"),
    "base weight": (trained_base, r"ln_f\.weight: not the values that the bank was made with"),
    "untracked half of the adapter": (trained_adapter, "not the values that the bank was made with"),
    "IA3 beside LoRA": (added_ia3, r"ia3_l: this weight of the model is not the bank's"),
    "base weight through .data": (written_by_data, r"wte\.weight: not the values"),
    "tracked weight": (trained_tracked, "belongs to weights with sha256"),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_forward_pass_is_refused_when_opened_and_at_each_call(tmp_path: Path, kind: str) -> None:
    change, message = CHANGES[kind]
    model = small()
    bank = belonging(tmp_path, model)
    scorer, free = Scorer(bank, model), Scorer(bank, model, allow_mismatch=["weights"])
    before = scorer.scores(queries())
    change(model)
    with pytest.raises(MismatchError, match=message):
        scorer.scores(queries())
    with pytest.raises(MismatchError, match=message):
        scorer.scores(queries())  # and again
    with pytest.raises(MismatchError, match=message):
        bank.check_model(model)
    free.scores(queries())
    bank.check_model(model, ["weights"])
    assert before.isfinite().all()


GONE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "switched off": (lambda model: model.base_model.disable_adapter_layers(), "are scaled by 0 and were|disabled"),
    "merged": (lambda model: model.merge_adapter(), "merged or disabled|not the values that the bank"),
    "unloaded": (lambda model: model.unload(), "no longer in the model|are not in this model"),
    "deleted": (lambda model: model.delete_adapter("default"), "no longer in the model|are not in this model"),
}


@pytest.mark.parametrize("kind", GONE)
def test_adapter_that_no_longer_runs_is_refused(tmp_path: Path, kind: str) -> None:
    change, message = GONE[kind]
    model = small()
    bank = belonging(tmp_path, model)
    scorer = Scorer(bank, model)
    change(model)
    for _ in range(2):
        with pytest.raises((MismatchError, UnsupportedError), match=message):
            scorer.scores(queries())
    with pytest.raises((MismatchError, UnsupportedError), match=message):
        Scorer(bank, model)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "epsilon": (gpt2, lambda: gpt2(layer_norm_epsilon=0.1)),
    "activation": (gpt2, lambda: gpt2(activation_function="relu")),
    "rotary base": (llama, lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "rotary scaling": (
        llama,
        lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_same_weights_under_another_setting_are_refused(tmp_path: Path, kind: str) -> None:
    """A base model that is loaded with another config computes something else with the same weights."""
    own, other = SETTINGS[kind]
    bank = belonging(tmp_path, adapted(own()).eval())
    bank.check_model(adapted(own()).eval())
    changed = adapted(other()).eval()
    with pytest.raises(MismatchError, match="though the forward pass computes with it"):
        bank.check_model(changed)
    bank.check_model(changed, ["weights"])


def test_same_values_written_again_are_accepted(tmp_path: Path) -> None:
    model = small()
    scorer = Scorer(belonging(tmp_path, model), model)
    before = scorer.scores(queries())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(scorer.scores(queries()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_base_in_another_dtype_is_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    """Only the base changes its dtype: adapters keep the one they were saved in."""
    model = small()
    bank = belonging(tmp_path, model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    bank.check_model(model)
    trained_base(model)
    with pytest.raises(MismatchError, match="ln_f"):
        bank.check_model(model)


def test_wrappers_and_resting_adapters_keep_the_identity(tmp_path: Path) -> None:
    model = small()
    bank = belonging(tmp_path, model)
    bank.check_model(model.base_model.model)
    bank.check_model(torch.nn.DataParallel(model))
    second = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model.add_adapter("second", second)
    model.set_adapter("default")
    bank.check_model(model)


def with_backend(**changes: Any) -> Any:
    result = tokenizer()
    for name, value in changes.items():
        setattr(result.backend_tokenizer, name, value)
    return result


def with_attribute(name: str, value: Any) -> Any:
    result = tokenizer()
    setattr(result, name, value)
    return result


def with_token(word: str) -> Any:
    result = tokenizer()
    result.add_tokens([word])
    return result


TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "normalizer": (lambda: with_backend(normalizer=normalizers.Lowercase()), "its (normalizer|encoding)"),
    "BOS": (
        lambda: with_backend(post_processor=processors.TemplateProcessing("<end> $A", None, [("<end>", 0)])),
        "its (post_processor|encoding of texts) is not the one",
    ),
    "added token": (lambda: with_token("w99"), "tokenized with a vocabulary"),
    "pre-tokenizer": (
        lambda: with_backend(pre_tokenizer=pre_tokenizers.Punctuation()),
        "its (pre_tokenizer|encoding of texts)",
    ),
    "EOS": (lambda: with_attribute("eos_token", "w1"), "its special tokens"),
    "chat template": (lambda: with_attribute("chat_template", "{{ messages }}"), "its chat template"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_tokenizer_of_the_same_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    other, message = TOKENIZERS[kind]
    bank = belonging(tmp_path, small())
    with pytest.raises(MismatchError, match=message):
        bank.check_tokenizer(other())


def test_saved_padded_and_truncating_tokenizers_are_the_same(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bank, own = belonging(tmp_path / "bank", small()), tokenizer()
    own(["w1 w2", "w3"], padding=True, truncation=True, max_length=1)
    bank.check_tokenizer(own)
    own.save_pretrained(tmp_path)
    bank.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    bank.check_tokenizer(with_attribute("pad_token", "w2"))
