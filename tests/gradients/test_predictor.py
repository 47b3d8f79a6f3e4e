"""Gradient predictor: exact at the last layer, well aligned elsewhere, refused for unknown models."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.models.likelihood import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import (
    ARCHITECTURES,
    CONTEXT,
    DIGITS,
    VOCABULARY,
    adapted,
    gpt2,
    llama,
    padded,
    projections,
    token_rows,
)
from tests.helpers.reference import agree


ATTENTION = {"gpt2": r"h\.1\.attn\.c_attn", "llama": r"layers\.1\.self_attn\.[qkv]_proj"}
MLP = {"gpt2": r"h\.1\.mlp\.", "llama": r"layers\.1\.mlp\."}
ATTENTION["qwen2"], MLP["qwen2"] = ATTENTION["llama"], MLP["llama"]


def exact(model: nn.Module, parameters: TrackedParameters, batch: dict[str, Tensor]) -> Tensor:
    """Per-sample gradients (rows, P) of the log-likelihood."""
    with frozen(model):
        return -PerSampleGradients(model, parameters, CAUSAL_LM)(batch)[0]


def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a last MLP that adds nothing, so that the error after its last attention is the final one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"(h|layers)\.1\.mlp\.(c_proj|down_proj)", name):
                parameter.zero_()
    return model


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_predicted_gradients_are_exact_at_the_last_layer(name: str, part: str, lora: bool) -> None:
    """There the error after the block is the final one, and everything else is analytic."""
    model: Any = ARCHITECTURES[name]()
    pattern, last = (ATTENTION, "attn") if part == "attention" else (MLP, "mlp")
    if part == "attention":
        silenced(model)
    if lora:
        chosen: Any = [p for p in projections(model) if part == "mlp" or p in ("c_attn", "q_proj", "k_proj", "v_proj")]
        if part == "mlp":
            chosen = rf".*(h|layers)\.1\.mlp\.({'|'.join(chosen)})"
        model = adapted(model, target_modules=chosen)
    parameters = TrackedParameters.of(model, rf"{pattern[name]}.*{'lora_' if lora else '(weight|bias)'}")
    batch = padded(token_rows())
    predictor = GradientPredictor(model, parameters, CAUSAL_LM)
    paths = predictor._projected_paths()
    assert len(paths) == 1
    assert last in paths[0]
    error_projections = {path.removeprefix("base_model.model."): torch.eye(12, dtype=torch.float64) for path in paths}
    predictor = GradientPredictor(model, parameters, CAUSAL_LM, error_projections)
    agree(predictor(batch), exact(model, parameters, batch), max(DIGITS[name], 1e-6))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fitted_predictions_are_aligned_with_gradients(name: str) -> None:
    model = adapted(ARCHITECTURES[name](torch.float32))
    parameters = TrackedParameters.of(model, "lora")
    rows = token_rows(60)
    predictor = GradientPredictor(model, parameters, CAUSAL_LM)
    error_projections = predictor.fit(padded(rows[at : at + 10]) for at in range(0, 40, 10))
    assert all(re.search(r"(c_proj|o_proj|down_proj)$", path) for path in error_projections)
    batch = padded(rows[40:])
    predicted, expected = predictor(batch), exact(model, parameters, batch)
    assert float(nn.functional.cosine_similarity(predicted, expected).median()) > 0.8
    again = GradientPredictor(model, parameters, CAUSAL_LM, error_projections)
    agree(again(batch), predicted, 1e-6)
    with pytest.raises(UnsupportedError, match=r"no error projection of"):
        GradientPredictor(model, parameters, CAUSAL_LM, dict(list(error_projections.items())[1:]))(batch)
    with pytest.raises(UnsupportedError, match=r"'nowhere', which the model lacks"):
        GradientPredictor(model, parameters, CAUSAL_LM, error_projections | {"nowhere": torch.eye(2)})


def test_padding_and_other_queries_change_nothing() -> None:
    model = adapted(llama())
    parameters = TrackedParameters.of(model, "lora")
    rows = token_rows(4)
    predictor = GradientPredictor(model, parameters, CAUSAL_LM)
    predictor.fit([padded(rows)])
    alone = torch.cat([predictor(padded([row])) for row in rows])
    agree(predictor(padded(rows, CONTEXT)), alone, 1e-5)


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double().eval()


def test_query_and_key_norms_are_analytic() -> None:
    model = adapted(silenced(qwen3()), target_modules=["q_proj", "k_proj", "v_proj"])
    parameters, batch = TrackedParameters.of(model, r"layers\.1\..*lora_"), padded(token_rows())
    error_projections = {"model.layers.1.self_attn.o_proj": torch.eye(12)}
    agree(
        GradientPredictor(model, parameters, CAUSAL_LM, error_projections)(batch),
        exact(model, parameters, batch),
        2e-5,
    )


def test_inputs_of_unknown_blocks_have_projections_of_their_own() -> None:
    model = adapted(llama())
    for layer in model.get_base_model().model.layers:
        layer.self_attn.scaling *= 1.5  # a patched attention, with another scaling than its attribute says
        layer.self_attn.forward = scaled_back(layer.self_attn)
    parameters = TrackedParameters.of(model, "lora")
    rows = token_rows(40)
    predictor = GradientPredictor(model, parameters, CAUSAL_LM)
    error_projections = predictor.fit([padded(rows[:30])])
    assert {path.rpartition(".")[2] for path in error_projections} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "down_proj",
    }
    predicted, expected = predictor(padded(rows[30:])), exact(model, parameters, padded(rows[30:]))
    assert float(nn.functional.cosine_similarity(predicted, expected).median()) > 0.5


def scaled_back(attention: Any) -> Callable[..., Any]:
    """An attention's forward at two thirds of its `scaling`."""
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        claimed, attention.scaling = attention.scaling, attention.scaling / 1.5
        try:
            return original(*args, **kwargs)
        finally:
            attention.scaling = claimed

    return forward


def test_unknown_models_are_refused() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, pad_token_id=0)
    classifier = GPT2ForSequenceClassification(config).eval()
    with pytest.raises(UnsupportedError, match="plain output layer"):
        GradientPredictor(classifier, TrackedParameters.of(classifier, "c_fc.weight"), SEQUENCE_CLASSIFICATION)
    model = gpt2()
    with pytest.raises(UnsupportedError, match="not a weight of a Linear layer"):
        GradientPredictor(model, TrackedParameters.of(model, r"ln_1\.weight"), CAUSAL_LM)
    dora = adapted(llama(torch.float32), use_dora=True)
    with pytest.raises(UnsupportedError, match="not a plain LoRA layer"):
        GradientPredictor(dora, TrackedParameters.of(dora, "lora_B"), CAUSAL_LM)
    lora = adapted(llama(torch.float32))
    with pytest.raises(UnsupportedError, match="nothing to fit"):
        GradientPredictor(lora, TrackedParameters.of(lora, "lora_B"), CAUSAL_LM).fit([])
