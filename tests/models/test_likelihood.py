"""Objectives, log-likelihoods and labels sampled from the model."""

from typing import get_args

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import (
    BertGenerationConfig,
    BertGenerationDecoder,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2Model,
)

from hf_fwdattr.bank.schema import Manifest
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.likelihood import (
    CAUSAL_LM,
    IGNORED,
    OBJECTIVE_NAMES,
    SEQUENCE_CLASSIFICATION,
    Objective,
    log_probabilities,
    resolve_objective,
    row_losses,
    sample_labels,
)
from tests.helpers.cases import CONTEXT, VOCABULARY, adapted, gpt2, llama, padded, qwen2_vl, token_rows
from tests.helpers.reference import agree


SIZES = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, pad_token_id=0)


def test_auto_objective_follows_the_model_class() -> None:
    assert resolve_objective(gpt2()) is CAUSAL_LM
    assert resolve_objective(adapted(llama())) is CAUSAL_LM
    assert resolve_objective(GPT2ForSequenceClassification(SIZES)) is SEQUENCE_CLASSIFICATION
    # Causal language models with other names.
    sizes = BertGenerationConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        is_decoder=True,
    )  # fmt: skip
    assert resolve_objective(BertGenerationDecoder(sizes)) is CAUSAL_LM
    assert resolve_objective(qwen2_vl()) is CAUSAL_LM


def test_only_names_that_a_bank_knows_are_accepted() -> None:
    with pytest.raises(ValueError, match="Objective: 'mine' is no known name"):
        Objective("mine", CAUSAL_LM.forward)
    assert get_args(Manifest.model_fields["objective"].annotation) == OBJECTIVE_NAMES


def test_explicit_objectives_are_used_as_they_are() -> None:
    def objective(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch["x"]), batch["labels"]

    assert resolve_objective(nn.Linear(1, 2), "causal-lm") is CAUSAL_LM
    assert resolve_objective(nn.Linear(1, 2), objective).forward is objective
    custom = Objective("custom", objective)
    assert resolve_objective(nn.Linear(1, 2), custom) is custom


REGRESSION = GPT2Config(**(SIZES.to_dict() | {"num_labels": 1}))
MANY_LABELS = GPT2Config(**(SIZES.to_dict() | {"problem_type": "multi_label_classification"}))


@pytest.mark.parametrize(
    "model",
    [
        GPT2Model(SIZES),
        GPT2ForTokenClassification(SIZES),
        GPT2ForSequenceClassification(REGRESSION),
        GPT2ForSequenceClassification(MANY_LABELS),
    ],
    ids=["no head", "labels per token", "regression", "several labels"],
)
def test_auto_objective_refuses_other_likelihoods(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="pass objective="):
        resolve_objective(model)


def test_row_losses_sum_to_the_models_loss() -> None:
    model, batch = gpt2(), padded(token_rows())
    logits, labels = CAUSAL_LM.forward(model, batch)
    tokens = (labels != IGNORED).sum()
    agree(row_losses(logits, labels).sum() / tokens, model(**batch).loss, 1e-6)
    classifier = GPT2ForSequenceClassification(SIZES).eval()
    batch |= {"labels": torch.tensor([0, 1, 1, 0, 1])}
    logits, labels = SEQUENCE_CLASSIFICATION.forward(classifier, batch)
    agree(row_losses(logits, labels).mean(), classifier(**batch).loss, 1e-6)


def test_log_probabilities_are_zero_at_unsupervised_positions() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORED, 4], [IGNORED, 0, 2]])
    values = log_probabilities(logits, labels)
    assert bool((values[labels == IGNORED] == 0).all())
    assert values[0, 2].item() == pytest.approx(logits[0, 2].log_softmax(-1)[4].item())


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 2, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = log_probabilities(logits, torch.tensor([[3, 4]]))
    assert values.dtype == torch.float32
    agree(values, log_probabilities(logits.double(), torch.tensor([[3, 4]])), 1e-6)


def test_sampled_labels_follow_the_models_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 2, 6, generator=generator)
    draws = 20_000
    uniforms = torch.rand(draws, 2, generator=generator, dtype=torch.float64)
    drawn = sample_labels(logits.expand(draws, -1, -1), torch.zeros(draws, 2, dtype=torch.long), uniforms)
    for position in range(2):
        expected = draws * logits[0, position].double().softmax(-1)
        result = chisquare(torch.bincount(drawn[:, position], minlength=6).numpy(), expected.numpy())
        assert result.pvalue > 0.01


def test_sampled_labels_depend_on_their_row_alone() -> None:
    model, rows = llama(), token_rows()
    uniforms = torch.rand(5, CONTEXT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def sampled(order: list[int], length: int) -> dict[int, list[int]]:
        logits, labels = CAUSAL_LM.forward(model, padded([rows[i] for i in order], length))
        chosen = sample_labels(logits, labels, uniforms[order, : labels.shape[1]])
        assert torch.equal(chosen == IGNORED, labels == IGNORED)
        return {
            i: [label for label in line if label != IGNORED] for i, line in zip(order, chosen.tolist(), strict=True)
        }

    assert sampled([0, 1, 2, 3, 4], 11) == sampled([3, 4, 0, 2, 1], 15)
    assert sampled([2], 5)[2] == sampled([2, 0], 13)[2]


@pytest.mark.parametrize("chunk", [1, VOCABULARY * 3, 10**9])
def test_sampled_labels_do_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = CAUSAL_LM.forward(gpt2(), padded(token_rows()))
    uniforms = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cumulative = logits.softmax(-1).cumsum(-1)
    expected = (
        (cumulative < uniforms.unsqueeze(-1) * cumulative[..., -1:]).sum(-1).masked_fill(labels == IGNORED, IGNORED)
    )
    monkeypatch.setattr("hf_fwdattr.models.likelihood._SAMPLING_CHUNK", chunk)
    assert torch.equal(sample_labels(logits, labels, uniforms), expected)


def test_class_without_probability_is_never_sampled() -> None:
    logits = torch.tensor([[[-5000.0, 0.0, -5000.0, 1.0, -5000.0]]]).expand(3, -1, -1)
    uniforms = torch.tensor([[0.0], [0.2], [1 - 1e-16]], dtype=torch.float64)
    assert sample_labels(logits, torch.zeros(3, 1).long(), uniforms).flatten().tolist() == [1, 1, 3]
