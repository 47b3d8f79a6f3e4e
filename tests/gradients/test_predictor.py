"""Predicted gradients: exact where the prediction has nothing to guess, refused where it cannot be made."""

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
from hf_fwdattr.models.parameters import Parameters
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


def exact(model: nn.Module, parameters: Parameters, batch: dict[str, Tensor]) -> Tensor:
    """(rows, P) of the log-likelihood."""
    with frozen(model):
        return -PerSampleGradients(model, parameters, CAUSAL_LM)(batch)[0]


def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose last MLP adds nothing, so that the error behind its last attention is the one at the end."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"(h|layers)\.1\.mlp\.(c_proj|down_proj)", name):
                parameter.zero_()
    return model


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_at_the_last_layer(name: str, part: str, lora: bool) -> None:
    """There the error at a block's end is the error at the model's end, and everything else is written out."""
    model: Any = ARCHITECTURES[name]()
    pattern, last = (ATTENTION, "attn") if part == "attention" else (MLP, "mlp")
    if part == "attention":
        silenced(model)
    if lora:
        chosen: Any = [p for p in projections(model) if part == "mlp" or p in ("c_attn", "q_proj", "k_proj", "v_proj")]
        if part == "mlp":
            chosen = rf".*(h|layers)\.1\.mlp\.({'|'.join(chosen)})"
        model = adapted(model, target_modules=chosen)
    parameters = Parameters.of(model, rf"{pattern[name]}.*{'lora_' if lora else '(weight|bias)'}")
    batch = padded(token_rows())
    synthetic = GradientPredictor(model, parameters, CAUSAL_LM)
    ends = synthetic._ends()
    assert len(ends) == 1
    assert last in ends[0]
    maps = {end.removeprefix("base_model.model."): torch.eye(12, dtype=torch.float64) for end in ends}
    synthetic = GradientPredictor(model, parameters, CAUSAL_LM, maps)
    agree(synthetic(batch), exact(model, parameters, batch), max(DIGITS[name], 1e-6))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fitted_maps_point_the_right_way_all_through_the_model(name: str) -> None:
    model = adapted(ARCHITECTURES[name](torch.float32))
    parameters = Parameters.of(model, "lora")
    rows = token_rows(60)
    synthetic = GradientPredictor(model, parameters, CAUSAL_LM)
    maps = synthetic.fit(padded(rows[at : at + 10]) for at in range(0, 40, 10))
    assert all(re.search(r"(c_proj|o_proj|down_proj)$", end) for end in maps)
    batch = padded(rows[40:])
    found, expected = synthetic(batch), exact(model, parameters, batch)
    assert float(nn.functional.cosine_similarity(found, expected).median()) > 0.8
    again = GradientPredictor(model, parameters, CAUSAL_LM, maps)
    agree(again(batch), found, 1e-6)
    with pytest.raises(UnsupportedError, match=r"no map of errors at"):
        GradientPredictor(model, parameters, CAUSAL_LM, dict(list(maps.items())[1:]))(batch)
    with pytest.raises(UnsupportedError, match=r"a layer that the model has not"):
        GradientPredictor(model, parameters, CAUSAL_LM, maps | {"nowhere": torch.eye(2)})


def test_padding_and_neighbours_change_nothing() -> None:
    model = adapted(llama())
    parameters = Parameters.of(model, "lora")
    rows = token_rows(4)
    synthetic = GradientPredictor(model, parameters, CAUSAL_LM)
    synthetic.fit([padded(rows)])
    alone = torch.cat([synthetic(padded([row])) for row in rows])
    agree(synthetic(padded(rows, CONTEXT)), alone, 1e-5)


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double().eval()


def test_norms_of_queries_and_keys_are_written_out_too() -> None:
    model = adapted(silenced(qwen3()), target_modules=["q_proj", "k_proj", "v_proj"])
    parameters, batch = Parameters.of(model, r"layers\.1\..*lora_"), padded(token_rows())
    maps = {"model.layers.1.self_attn.o_proj": torch.eye(12)}
    agree(GradientPredictor(model, parameters, CAUSAL_LM, maps)(batch), exact(model, parameters, batch), 2e-5)


def test_a_block_that_is_computed_in_another_way_gets_maps_of_its_own() -> None:
    model = adapted(llama())
    for layer in model.get_base_model().model.layers:
        layer.self_attn.scaling *= 1.5  # as if attention had been patched: what is said is not what is done
        layer.self_attn.forward = scaled_back(layer.self_attn)
    parameters = Parameters.of(model, "lora")
    rows = token_rows(40)
    synthetic = GradientPredictor(model, parameters, CAUSAL_LM)
    maps = synthetic.fit([padded(rows[:30])])
    assert {end.rpartition(".")[2] for end in maps} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    found, expected = synthetic(padded(rows[30:])), exact(model, parameters, padded(rows[30:]))
    assert float(nn.functional.cosine_similarity(found, expected).median()) > 0.5


def scaled_back(attention: Any) -> Callable[..., Any]:
    """Its forward, at two thirds of the scaling that it claims."""
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        claimed, attention.scaling = attention.scaling, attention.scaling / 1.5
        try:
            return original(*args, **kwargs)
        finally:
            attention.scaling = claimed

    return forward


def test_what_cannot_be_predicted_is_refused() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, pad_token_id=0)
    classifier = GPT2ForSequenceClassification(config).eval()
    with pytest.raises(UnsupportedError, match="plain output layer"):
        GradientPredictor(classifier, Parameters.of(classifier, "c_fc.weight"), SEQUENCE_CLASSIFICATION)
    model = gpt2()
    with pytest.raises(UnsupportedError, match="not of a Linear layer"):
        GradientPredictor(model, Parameters.of(model, r"ln_1\.weight"), CAUSAL_LM)
    dora = adapted(llama(torch.float32), use_dora=True)
    with pytest.raises(UnsupportedError, match="not a plain LoRA layer"):
        GradientPredictor(dora, Parameters.of(dora, "lora_B"), CAUSAL_LM)
    lora = adapted(llama(torch.float32))
    with pytest.raises(UnsupportedError, match="nothing to fit"):
        GradientPredictor(lora, Parameters.of(lora, "lora_B"), CAUSAL_LM).fit([])
