"""Tracked parameters: selection, canonical names, the flat vector and its fingerprint."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.names import canonical_name
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import ARCHITECTURES, adapted, gpt2, llama, projections, qwen2


class Wrapper(nn.Module):
    """A wrapper like DistributedDataParallel, with the model under `module`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model


def injected(rank: int = 2) -> nn.Module:
    """Llama with LoRA injected into the model, without a PeftModel around it."""
    model = llama()
    return inject_adapter_in_model(LoraConfig(r=rank, target_modules=projections(model)), model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # type: ignore[return-value]


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": Wrapper,
    "compiled": compiled,
    "both": lambda model: Wrapper(compiled(model)),
    "both, the other way round": lambda model: compiled(Wrapper(model)),
}


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch 2.13's compiler
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_change_neither_names_nor_fingerprint(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted(llama())
    plain, wrapped = TrackedParameters.of(model, "lora"), TrackedParameters.of(wrap(model), "lora")
    assert wrapped.names == plain.names
    assert wrapped.live != plain.live
    assert wrapped.fingerprint(wrap(model)) == plain.fingerprint(model)


def test_peft_and_injected_models_have_the_same_names() -> None:
    model, other = adapted(llama()), injected()
    peft, plain = TrackedParameters.of(model, "lora"), TrackedParameters.of(other, "lora")
    assert peft.names == plain.names
    assert peft.shapes == plain.shapes
    plain.write(other, peft.read(model))
    assert peft.fingerprint(model) == plain.fingerprint(other)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_adapter_weights_are_named_as_in_adapter_files(changes: dict[str, Any]) -> None:
    model = adapted(llama(), **changes)
    file = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(TrackedParameters.of(model, "trainable").names) == set(file)


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_base_weights_are_named_as_in_model_files(make: Callable[[], nn.Module]) -> None:
    plain = {name for name, _ in make().named_parameters()}
    model = adapted(make())
    assert {canonical_name(name) for name, _ in model.named_parameters() if "lora_" not in name} == plain
    assert set(TrackedParameters.of(make(), "trainable").names) == plain


def test_inner_module_prefix_is_kept() -> None:
    assert canonical_name("encoder.module.weight") == "encoder.module.weight"
    assert canonical_name("module.encoder.weight") == "encoder.weight"


def test_replaced_head_has_the_name_of_the_original() -> None:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = adapted(LlamaForSequenceClassification(config), modules_to_save=["score"])
    parameters = TrackedParameters.of(model, r"^score\.")
    assert parameters.names == ("score.weight",)
    assert parameters.tensors(model)[0].requires_grad


def test_auto_selects_lora_b_or_linear_weights() -> None:
    model = adapted(gpt2())
    assert TrackedParameters.of(model) == TrackedParameters.of(model, "lora_B")
    plain = TrackedParameters.of(qwen2())
    assert plain == TrackedParameters.of(qwen2(), "linear")
    assert all(name.endswith("_proj.weight") for name in plain.names)


def test_named_selections_select_their_weights() -> None:
    model = adapted(llama())
    sites = 2 * len(projections(llama()))
    b, both = TrackedParameters.of(model, "lora_B"), TrackedParameters.of(model, "lora")
    assert len(b.names) == sites
    assert len(both.names) == 2 * sites
    assert all(name.endswith(".lora_B.weight") for name in b.names)
    assert TrackedParameters.of(model, "trainable") == both
    expression = TrackedParameters.of(model, [r"layers\.1\..*\.v_proj\.lora_", r"^model\.norm"])
    assert [name.rpartition("v_proj.")[2] for name in expression.names] == [
        "lora_A.weight", "lora_B.weight", "model.norm.weight"
    ]  # fmt: skip
    assert expression.size == sum(p.numel() for p in expression.tensors(model))


def test_auto_selects_trainable_weights_only() -> None:
    model = gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.1" in name)
    assert all("h.1" in name for name in TrackedParameters.of(model).names)


def test_read_write_split_and_join_are_inverses() -> None:
    model = adapted(gpt2())
    parameters = TrackedParameters.of(model, "lora")
    theta = parameters.read(model)
    assert theta.shape == (parameters.size,)
    assert theta.dtype == torch.float64
    for block, parameter in zip(parameters.split(theta), parameters.tensors(model), strict=True):
        assert torch.equal(block, parameter)
    parameters.write(model, theta + 1)
    assert torch.equal(parameters.read(model), theta + 1)
    assert torch.equal(parameters.read(model), theta + 1)
    stacked = torch.stack([theta, 2 * theta])
    joined = parameters.join(dict(zip(parameters.live, parameters.split(stacked), strict=True)))
    assert torch.equal(joined, stacked)


def test_scalar_weights_are_split_and_joined() -> None:
    model = nn.Module()
    model.scale, model.weight = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))
    parameters = TrackedParameters.of(model, "trainable")
    stacked = torch.arange(8.0).reshape(2, 4)
    blocks = parameters.split(stacked)
    assert [tuple(block.shape) for block in blocks] == [(2,), (2, 3)]
    assert torch.equal(parameters.join(dict(zip(parameters.live, blocks, strict=True))), stacked)


def test_half_precision_is_read_and_written_exactly() -> None:
    model = gpt2(torch.bfloat16)
    parameters = TrackedParameters.of(model, "linear")
    theta = parameters.read(model)
    assert theta.dtype == torch.float32
    parameters.write(model, theta)
    assert torch.equal(parameters.read(model), theta)
    assert parameters.fingerprint(model) == TrackedParameters.of(model.float(), "linear").fingerprint(model.float())


def test_fingerprint_depends_on_every_tracked_bit_and_nothing_else() -> None:
    model = adapted(gpt2(torch.float32))
    parameters = TrackedParameters.of(model, "lora_B")
    before = parameters.fingerprint(model)
    for tensor in parameters.tensors(model)[::3]:
        bits = tensor.data.view(torch.int32).view(-1)
        for bit in (0, 13, 31):
            bits[-1] ^= 1 << bit if bit < 31 else -(1 << 31)
            assert parameters.fingerprint(model) != before
            bits[-1] ^= 1 << bit if bit < 31 else -(1 << 31)
    with torch.no_grad():
        model.get_parameter("base_model.model.transformer.wte.weight").add_(1)
    assert parameters.fingerprint(model) == before


def test_fingerprint_changes_when_weights_are_swapped() -> None:
    model = adapted(llama())
    parameters = TrackedParameters.of(model, "lora_B")
    twins = [i for i, name in enumerate(parameters.names) if "up_proj" in name]
    before = parameters.fingerprint(model)
    first, second = (parameters.tensors(model)[i].data for i in twins)
    swapped = first.clone()
    first.copy_(second)
    second.copy_(swapped)
    assert parameters.fingerprint(model) != before


@pytest.mark.xfail(reason="values are read as float32, so that float64 and half precision copies of a model agree")
def test_fingerprint_depends_on_float64_bits() -> None:
    model = gpt2(torch.float64)
    parameters = TrackedParameters.of(model, "linear")
    before = parameters.fingerprint(model)
    parameters.tensors(model)[0].data.view(torch.int64).view(-1)[0] ^= 1
    assert parameters.fingerprint(model) != before


def test_fingerprint_depends_on_names_and_shapes() -> None:
    def fingerprint(**weights: torch.Tensor) -> str:
        model = nn.ParameterDict(weights)
        return TrackedParameters.of(model, "trainable").fingerprint(model)

    values = torch.arange(6.0)
    assert fingerprint(a=values) == fingerprint(a=values.clone())
    assert len({fingerprint(a=values), fingerprint(b=values), fingerprint(a=values.view(2, 3))}) == 3


def test_auto_tracks_a_trained_prompt() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert TrackedParameters.of(model, "auto").shapes == ((3, 12),)


def test_empty_selection_is_refused_with_examples() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedError, match=r"parameters='trainable' selects what is trained: prompt_encoder"):
        TrackedParameters.of(model, "linear")
    with pytest.raises(UnsupportedError, match=r"selects no weight of LlamaForCausalLM.*model\.embed_tokens\.weight"):
        TrackedParameters.of(llama(), "lora_B")


@pytest.mark.parametrize("spec", ["auto", "lora", "lora_B", [r"lora_B"]])
def test_active_one_of_two_adapters_is_tracked(spec: str | list[str]) -> None:
    model = adapted(llama())
    alone = TrackedParameters.of(model, spec)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    assert TrackedParameters.of(model, spec) == alone
    model.set_adapter("second")
    tracked = TrackedParameters.of(model, spec)
    assert all(".second." in name and "q_proj" in name for name in tracked.live)
    assert tracked.names == tuple(name for name in alone.names if "q_proj" in name)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match=r"several adapters.*model\.set_adapter"):
        TrackedParameters.of(model, spec)


def test_heads_of_the_vocabulary_are_not_tracked_by_default() -> None:
    """A hundred directions of them would take more than a hundred models."""
    model = adapted(llama(), modules_to_save=["lm_head"])
    assert TrackedParameters.of(model).names == TrackedParameters.of(adapted(llama())).names
    assert "lm_head.weight" in TrackedParameters.of(model, "trainable").names


def test_quantised_weights_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"torch.uint8"):
        TrackedParameters.of(model, "weight")
