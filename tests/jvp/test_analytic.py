"""Analytic backend against derivatives by reverse mode, and its fallback to torch's forward mode."""

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

import hf_fwdattr.jvp.analytic
from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.jvp.analytic import AnalyticJVP, AnalyticModel, TooLarge
from hf_fwdattr.jvp.backend import Backend
from hf_fwdattr.jvp.torch_func import TorchFuncJVP
from hf_fwdattr.models.likelihood import CAUSAL_LM, IGNORED, UNSHIFTED_CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
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
def test_derivatives_equal_reverse_mode(name: str, spec: str) -> None:
    model = adapted(KINDS[name]())
    parameters, batch = TrackedParameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    derivatives = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    assert bool((derivatives[batch["labels"][:, 1:] == IGNORED] == 0).all())
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), DIGITS.get(name, 2e-5))


@pytest.mark.parametrize(
    "spec",
    [
        "linear", r"attn\.c_attn\.(weight|bias)$", r"h\.1\.mlp\.c_proj\.bias", r"h\.0\.attn\.c_proj\.weight",
        r"layers\.1.*v_proj", r"layers\.0.*k_proj", r"layers\.0.*q_proj", r"layers\.1.*gate_proj",
        r"layers\.1.*up_proj", r"layers\.0.*o_proj", r"layers\.1.*down_proj",
    ],
)  # fmt: skip
def test_weights_of_any_projection_can_be_tracked(spec: str) -> None:
    model = gpt2() if spec == "linear" or "h" in spec or "c_attn" in spec else llama()
    parameters = TrackedParameters.of(model, spec if spec != "linear" else r"(c_attn|c_proj|c_fc)\.weight$")
    batch, directions = padded(token_rows()), random_directions(parameters, dtype=torch.float64)
    derivatives = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 2e-5)


def test_biases_of_adapters_can_be_tracked() -> None:
    model, batch = adapted(llama(attention_bias=True, mlp_bias=True), lora_bias=True), padded(token_rows())
    parameters = TrackedParameters.of(model, "trainable")
    directions = random_directions(parameters, dtype=torch.float64)
    derivatives = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 2e-5)


def test_batched_queries_and_padding_do_not_interact() -> None:
    model, rows = adapted(gpt2()), token_rows()
    parameters = TrackedParameters.of(model)
    directions = random_directions(parameters, dtype=torch.float64)
    batched = AnalyticJVP(model, parameters, CAUSAL_LM, padded(rows, CONTEXT)).jvp(directions)
    for index, row in enumerate(rows):
        alone = AnalyticJVP(model, parameters, CAUSAL_LM, padded([row])).jvp(directions)
        agree(batched[index, : alone.shape[1]], alone[0], 1e-10)
        assert bool((batched[index, alone.shape[1] :] == 0).all())


def test_merged_adapter_counts_once() -> None:
    model = adapted(llama())
    model.merge_adapter()
    parameters = TrackedParameters.of(model, r"down_proj\.weight$")
    batch, directions = padded(token_rows()), random_directions(parameters, dtype=torch.float64)
    derivatives = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_half_precision_rounds_products_only(name: str) -> None:
    model = adapted(KINDS[name](torch.float32))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    full = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    half = AnalyticJVP(model, parameters, CAUSAL_LM, batch, torch.bfloat16).jvp(directions)
    assert half.dtype == torch.float32
    assert 1e-5 < float((half - full).norm() / full.norm()) < 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_models_are_as_accurate_as_by_torch_func(name: str) -> None:
    model = adapted(KINDS[name](torch.bfloat16))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    derivatives = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    by_torch = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    exact = by_reverse_mode(model, parameters, batch, directions).detach()
    error, torch_error = (float((d.double() - exact).norm() / exact.norm()) for d in (derivatives, by_torch))
    assert error < max(1.2 * torch_error, 1e-2)


def test_autocast_rounds_products_as_the_models_own() -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    exact = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    with torch.autocast("cpu", torch.bfloat16):
        derivatives = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    assert 1e-4 < float((derivatives - exact).norm() / exact.norm()) < 3e-2


def granite() -> nn.Module:
    """Llama with scaled additions to the residual stream."""
    torch.manual_seed(0)
    return finished(GraniteForCausalLM(GraniteConfig(**(SIZES | {"residual_multiplier": 0.5}))), torch.float64)


def sine_mlp(model: PreTrainedModel) -> PreTrainedModel:
    """Give the MLPs another activation than their own."""
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(mlp.gate_proj(x).sin() * mlp.up_proj(x))
    return model


def changed_before_norm(model: PreTrainedModel) -> PreTrainedModel:
    """Change the hidden state between the second layer and the norm."""
    model.model.norm.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0] + 1.0,))
    return model


def changed_between_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Change the hidden state between the layers."""
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: (-inputs[0], *inputs[1:]))
    return model


@pytest.mark.parametrize(
    ("make", "spec", "why"),
    [
        (lambda: adapted(granite()), "lora_B", "does not add its blocks"),
        (lambda: adapted(sine_mlp(llama())), "lora_B", r"mlp does not compute"),
        (lambda: adapted(changed_before_norm(llama())), "lora_B", "not exactly one norm"),
        (lambda: adapted(changed_between_layers(llama())), "lora_B", "is not the output of"),
        (lambda: llama(), r"norm\.weight", "not a weight of a Linear layer"),
        (lambda: llama(), r"lm_head\.weight", "has no analytic layers"),
        (lambda: gpt2(), "trainable", "has no analytic layers"),
    ],
    ids=["granite", "sine MLP", "changed before norm", "changed between layers", "norms", "head", "all"],
)  # fmt: skip
def test_unknown_architecture_falls_back_to_torch_func(make: Callable[[], nn.Module], spec: str, why: str) -> None:
    model = make()
    parameters, batch = TrackedParameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=why):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    derivatives = Backend(model, parameters).prepare(batch).jvp(directions)
    assert torch.equal(derivatives, TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions))


def test_training_mode_is_refused() -> None:
    model = adapted(llama()).train()
    parameters = TrackedParameters.of(model)
    with pytest.raises(UnsupportedError, match="training mode"):
        Backend(model, parameters).prepare(padded(token_rows())).jvp(
            random_directions(parameters, dtype=torch.float64)
        )


def test_too_large_batch_falls_back_to_torch_func_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    backend = Backend(model, parameters)
    analytic = backend.prepare(batch).jvp(directions)
    monkeypatch.setattr(hf_fwdattr.jvp.analytic, "_CPU_RECORDED", 1000)
    with pytest.raises(TooLarge, match="recording a pass over"):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    by_torch = backend.prepare(batch).jvp(directions)
    assert torch.equal(by_torch, TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions))
    monkeypatch.undo()
    assert torch.equal(backend.prepare(batch).jvp(directions), analytic)


def test_backend_obeys_readout_and_precision() -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    analytic = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    half = AnalyticJVP(model, parameters, CAUSAL_LM, batch, torch.bfloat16).jvp(directions)
    by_torch = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    for settings, two_stage, expected in (
        ({}, False, analytic), ({}, True, analytic), ({"precision": "half"}, False, half),
        ({"precision": "full"}, True, analytic), ({"readout": "jvp"}, True, by_torch),
    ):  # fmt: skip
        assert torch.equal(Backend(model, parameters, **settings).prepare(batch, two_stage).jvp(directions), expected)
    with pytest.raises(ValueError, match="precision='double': one of auto, full, half"):
        Backend(model, parameters, precision="double")


def test_large_model_uses_half_precision_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    monkeypatch.setattr("hf_fwdattr.jvp.backend._SMALL", 10)
    full = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    for fast in (True, False):
        monkeypatch.setattr("hf_fwdattr.jvp.backend._has_fast_bfloat16", lambda _, fast=fast: fast)
        assert torch.equal(Backend(model, parameters).prepare(batch, True).jvp(directions), full) is not fast
        assert torch.equal(Backend(model, parameters).prepare(batch, False).jvp(directions), full)
        assert torch.equal(Backend(model, parameters, precision="full").prepare(batch, True).jvp(directions), full)


def test_derivatives_that_are_not_finite_are_refused() -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    directions[2, 5] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        Backend(model, parameters).prepare(batch).jvp(directions)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_what_is_not_kept_is_computed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices and attention weights are not kept between chunks; small ones give the same derivatives."""
    model = adapted(KINDS[name]())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    kept = AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    for module in ("linear", "attention"):
        monkeypatch.setattr(f"hf_fwdattr.layers.{module}._KEPT", 0)
    agree(AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions), kept, 1e-10)


def test_parts_of_a_model_belong_to_a_likelihood() -> None:
    model = gpt2()
    parts = AnalyticModel(model, TrackedParameters.of(model, "linear"), CAUSAL_LM)
    assert parts.describes(model, CAUSAL_LM)
    assert not parts.describes(model, UNSHIFTED_CAUSAL_LM)


def test_parts_of_a_model_are_found_anew_when_modules_change() -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    backend, directions = Backend(model, parameters), random_directions(parameters)
    backend.prepare(batch)
    parts = backend._parts
    backend.prepare(batch)
    assert backend._parts is parts
    layer = model.get_base_model().model.layers[0]
    layer.mlp.act_fn = nn.Tanh().eval()
    derivatives = backend.prepare(batch).jvp(directions)
    assert backend._parts is not parts
    assert torch.equal(derivatives, AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions))
