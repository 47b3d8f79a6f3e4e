"""Forward mode written out, against derivatives by reverse mode, and against torch's where it does not apply."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

import hf_fwdattr.jvp.analytic as reading
from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.jvp import torch_func as jvp
from hf_fwdattr.jvp.analytic import AnalyticJVP, TooLarge
from hf_fwdattr.jvp.backend import Backend
from hf_fwdattr.models.likelihood import CAUSAL_LM, IGNORED
from hf_fwdattr.models.parameters import Parameters
from tests.helpers.cases import (
    ARCHITECTURES,
    CONTEXT,
    DIGITS,
    VOCABULARY,
    adapted,
    finished,
    gpt2,
    llama,
    padded,
    token_rows,
)
from tests.helpers.reference import agree
from tests.jvp.test_backends import by_reverse_mode, random_directions


SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=12, intermediate_size=20, head_dim=6,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def qwen3(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Norms of queries and keys; two heads to a key."""
    torch.manual_seed(0)
    return finished(Qwen3ForCausalLM(Qwen3Config(**SIZES)), dtype)


def gemma2(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Norms behind attention and MLP, gains that are offsets from one, attention in its eager form."""
    torch.manual_seed(0)
    settings = SIZES | dict(
        query_pre_attn_scalar=6, sliding_window=CONTEXT, final_logit_softcapping=None, attn_logit_softcapping=None,
        hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    return finished(Gemma2ForCausalLM(Gemma2Config(**settings)), dtype)


def gemma3(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Both, and a window on every other layer."""
    torch.manual_seed(0)
    settings = SIZES | dict(
        query_pre_attn_scalar=6, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    )
    return finished(Gemma3ForCausalLM(Gemma3TextConfig(**settings)), dtype)


def mistral(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A window on every layer."""
    torch.manual_seed(0)
    return finished(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)), dtype)


def starcoder2(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Layer norms, an MLP without gate whose layers are called as GPT-2's, biases everywhere, rotary positions."""
    torch.manual_seed(0)
    return finished(Starcoder2ForCausalLM(Starcoder2Config(**SIZES)), dtype)


def gemma(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Embeddings that are scaled, gains that are offsets from one."""
    torch.manual_seed(0)
    return finished(GemmaForCausalLM(GemmaConfig(**SIZES)), dtype)


KINDS: dict[str, Callable[..., PreTrainedModel]] = ARCHITECTURES | {
    "qwen3": qwen3, "gemma": gemma, "gemma2": gemma2, "gemma3": gemma3, "mistral": mistral, "starcoder2": starcoder2,
    "gpt2, scaled by layer": partial(gpt2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "llama, biases, yarn": partial(
        llama, attention_bias=True, mlp_bias=True,
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=100.0, original_max_position_embeddings=8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spec", ["lora_B", "lora"])
@pytest.mark.parametrize("name", KINDS)
def test_derivatives_are_those_of_reverse_mode(name: str, spec: str) -> None:
    model = adapted(KINDS[name]())
    parameters, batch = Parameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    found = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    assert bool((found[batch["labels"][:, 1:] == IGNORED] == 0).all())
    agree(found, by_reverse_mode(model, parameters, batch, directions), DIGITS.get(name, 2e-5))


@pytest.mark.parametrize(
    "spec",
    [
        "linear", r"attn\.c_attn\.(weight|bias)$", r"h\.1\.mlp\.c_proj\.bias", r"h\.0\.attn\.c_proj\.weight",
        r"layers\.1.*v_proj", r"layers\.0.*k_proj", r"layers\.0.*q_proj", r"layers\.1.*gate_proj",
        r"layers\.1.*up_proj", r"layers\.0.*o_proj", r"layers\.1.*down_proj",
    ],
)  # fmt: skip
def test_weights_of_any_projection_may_respond(spec: str) -> None:
    model = gpt2() if spec == "linear" or "h" in spec or "c_attn" in spec else llama()
    parameters = Parameters.of(model, spec if spec != "linear" else r"(c_attn|c_proj|c_fc)\.weight$")
    batch, directions = padded(token_rows()), random_directions(parameters, dtype=torch.float64)
    found = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 2e-5)


def test_biases_of_adapters_respond() -> None:
    model, batch = adapted(llama(attention_bias=True, mlp_bias=True), lora_bias=True), padded(token_rows())
    parameters = Parameters.of(model, "trainable")
    directions = random_directions(parameters, dtype=torch.float64)
    found = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 2e-5)


def test_queries_do_not_see_each_other_nor_their_padding() -> None:
    model, rows = adapted(gpt2()), token_rows()
    parameters = Parameters.of(model)
    directions = random_directions(parameters, dtype=torch.float64)
    raise_on_all_ranks = AnalyticJVP(model, parameters, CAUSAL_LM, padded(rows, CONTEXT)).along(directions)
    for index, row in enumerate(rows):
        alone = AnalyticJVP(model, parameters, CAUSAL_LM, padded([row])).along(directions)
        agree(raise_on_all_ranks[index, : alone.shape[1]], alone[0], 1e-10)
        assert bool((raise_on_all_ranks[index, alone.shape[1] :] == 0).all())


def test_a_merged_and_a_switched_off_adapter_move_nothing_twice() -> None:
    model = adapted(llama())
    model.merge_adapter()
    parameters = Parameters.of(model, r"down_proj\.weight$")
    batch, directions = (
        padded(token_rows()),
        random_directions(Parameters.of(model, r"down_proj\.weight$"), dtype=torch.float64),
    )
    found = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_half_precision_rounds_products_only(name: str) -> None:
    model = adapted(KINDS[name](torch.float32))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    full = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    half = AnalyticJVP(model, parameters, CAUSAL_LM, batch, torch.bfloat16).along(directions)
    assert half.dtype == torch.float32
    off = float((half - full).norm() / full.norm())
    assert 1e-5 < off < 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_in_half_precision_are_read_as_well_as_by_torch(name: str) -> None:
    model = adapted(KINDS[name](torch.bfloat16))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    found = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    torchs = jvp.read(model, parameters, CAUSAL_LM, batch, directions)
    exact = by_reverse_mode(model, parameters, batch, directions).detach()
    off, others = (float((way.double() - exact).norm() / exact.norm()) for way in (found, torchs))
    assert off < max(1.2 * others, 1e-2)


def test_under_autocast_products_are_rounded_as_the_models_are() -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    exact = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    with torch.autocast("cpu", torch.bfloat16):
        found = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 3e-2


def granite() -> nn.Module:
    """A Llama that scales what it adds to the residual stream."""
    torch.manual_seed(0)
    return finished(GraniteForCausalLM(GraniteConfig(**(SIZES | {"residual_multiplier": 0.5}))), torch.float64)


def sine(model: PreTrainedModel) -> PreTrainedModel:
    """Its MLPs open with something else than their activation."""
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(mlp.gate_proj(x).sin() * mlp.up_proj(x))
    return model


def louder(model: PreTrainedModel) -> PreTrainedModel:
    """Something happens between the second layer and the norm."""
    model.model.norm.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0] + 1.0,))
    return model


def flipped(model: PreTrainedModel) -> PreTrainedModel:
    """Something happens between the layers."""
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: (-inputs[0], *inputs[1:]))
    return model


@pytest.mark.parametrize(
    ("make", "spec", "why"),
    [
        (lambda: adapted(granite()), "lora_B", "adds up its blocks"),
        (lambda: adapted(sine(llama())), "lora_B", r"mlp computes something else"),
        (lambda: adapted(louder(llama())), "lora_B", "something else than a norm"),
        (lambda: adapted(flipped(llama())), "lora_B", "does not begin where"),
        (lambda: adapted(llama(), use_dora=True), "lora_B", "not a plain LoRA layer"),
        (lambda: llama(), r"norm\.weight", "not of a Linear layer"),
        (lambda: llama(), r"lm_head\.weight", "no kind that is written out"),
        (lambda: gpt2(), "trainable", "no kind that is written out"),
    ],
    ids=["granite", "sine", "louder", "flipped", "DoRA", "norms", "head", "everything"],
)  # fmt: skip
def test_what_is_not_written_out_is_refused_and_left_to_torch(
    make: Callable[[], nn.Module], spec: str, why: str
) -> None:
    model = make()
    parameters, batch = Parameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=why):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    found = Backend(model, parameters).opened(batch)(directions)
    assert torch.equal(found, jvp.read(model, parameters, CAUSAL_LM, batch, directions))


def test_dropout_is_refused_as_ever() -> None:
    model = adapted(llama()).train()
    parameters = Parameters.of(model)
    with pytest.raises(UnsupportedError, match="training mode"):
        Backend(model, parameters).opened(padded(token_rows()))(random_directions(parameters, dtype=torch.float64))


def test_what_would_not_fit_is_left_to_torch_this_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama())
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    engine = Backend(model, parameters)
    written = engine.opened(batch)(directions)
    monkeypatch.setattr(reading, "_CPU_KEPT", 1000)
    with pytest.raises(TooLarge, match="keeping a pass over"):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    torchs = engine.opened(batch)(directions)
    assert torch.equal(torchs, jvp.read(model, parameters, CAUSAL_LM, batch, directions))
    monkeypatch.undo()
    assert torch.equal(engine.opened(batch)(directions), written)


def test_ways_and_precisions_are_the_engines_to_choose() -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    tangents = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    half = AnalyticJVP(model, parameters, CAUSAL_LM, batch, torch.bfloat16).along(directions)
    torchs = jvp.read(model, parameters, CAUSAL_LM, batch, directions)
    for settings, staged, expected in (
        ({}, False, tangents), ({}, True, tangents), ({"precision": "half"}, False, half),
        ({"precision": "full"}, True, tangents), ({"way": "jvp"}, True, torchs),
    ):  # fmt: skip
        assert torch.equal(Backend(model, parameters, **settings).opened(batch, staged)(directions), expected)
    with pytest.raises(ValueError, match="precision='double': one of auto, full, half"):
        Backend(model, parameters, precision="double")


def test_a_large_model_is_read_in_half_precision_where_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    monkeypatch.setattr("hf_fwdattr.jvp.backend._SMALL", 10)
    full = AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions)
    for quick in (True, False):
        monkeypatch.setattr("hf_fwdattr.jvp.backend._multiplies_bfloat16", lambda _, quick=quick: quick)
        assert torch.equal(Backend(model, parameters).opened(batch, True)(directions), full) is not quick
        assert torch.equal(Backend(model, parameters).opened(batch, False)(directions), full)
        assert torch.equal(Backend(model, parameters, precision="full").opened(batch, True)(directions), full)


def test_what_is_not_finite_is_refused() -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    directions[2, 5] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        Backend(model, parameters).opened(batch)(directions)
