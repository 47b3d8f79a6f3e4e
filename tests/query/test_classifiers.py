"""Sequence classifiers through the pipeline: text in, label out, rows and sources behind it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, default_data_collator

from hf_fwdattr import AutoModelForAttribution
from hf_fwdattr.errors import QueryError
from hf_fwdattr.query.batch import batch_scores
from tests.helpers.cases import CONTEXT, VOCABULARY
from tests.helpers.reference import agree
from tests.helpers.runs import ask, config, fine_tune


NAMES = {0: "bad", 1: "good", 2: "mixed"}


def classifier() -> Any:
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=2, n_head=2, pad_token_id=0, num_labels=3,
        id2label=NAMES, label2id={name: number for number, name in NAMES.items()}, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2ForSequenceClassification(settings)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = [
        {"input_ids": [1 + (i * 5 + t) % 22 for t in range(6)], "labels": i % 3, "source": f"s{i % 2}"}
        for i in range(9)
    ]
    settings = config(parameters="trainable")
    folder: Path = tmp_path_factory.mktemp("classifier")
    model = classifier()
    bank = fine_tune(folder, model, settings, Dataset.from_list(rows), collate=default_data_collator).bank
    return ask(model.eval(), bank)


def test_named_rows_of_a_given_label_are_those_of_the_batch(asked: Any) -> None:
    result = asked({"text": "w1 w4 w9", "label": "good"}, top_k=9)
    assert set(result) == {"label", "examples", "sources"}
    assert result["label"] == "good"
    batch = {
        "input_ids": torch.tensor([[1, 4, 9]]), "attention_mask": torch.ones(1, 3).long(), "labels": torch.tensor([1])
    }  # fmt: skip
    expected = batch_scores(asked.model, asked.bank, batch)[0]
    named = {example["row"]: example["score"] for example in result["examples"]}
    assert sorted(named) == list(range(9))
    agree(torch.tensor([named[row] for row in range(9)]), expected, 1e-4)
    assert all(example["token_scores"] == [pytest.approx(example["score"])] for example in result["examples"])
    sources = {source["source"]: source["score"] for source in result["sources"]}
    sums = torch.stack([expected[0::2].sum(), expected[1::2].sum()])
    agree(torch.tensor([sources["s0"], sources["s1"]]), sums, 1e-3)
    assert "plain output layer" in asked.bank.manifest.predictor_missing
    assert "no gradient predictor" in repr(asked.bank)


def test_text_alone_is_asked_about_its_predicted_label(asked: Any) -> None:
    ids = torch.tensor([[3, 7]])
    label = int(asked.model(input_ids=ids).logits[0].argmax())
    result = asked("w3 w7")
    assert result["label"] == NAMES[label]
    assert result == asked({"text": "w3 w7", "label": label}) == asked({"input_ids": [3, 7]})


def test_list_and_batch_equal_single_inputs(asked: Any) -> None:
    inputs: list[Any] = ["w3 w7", {"text": "w1 w2 w5 w6", "label": 2}]
    singles = [asked(value, top_k=2) for value in inputs]
    for together in (asked(inputs, top_k=2), asked(inputs, top_k=2, batch_size=2)):
        for one, other in zip(together, singles, strict=True):
            assert one["label"] == other["label"]
            assert [row["row"] for row in one["examples"]] == [row["row"] for row in other["examples"]]
            first, second = (torch.tensor([row["score"] for row in result["examples"]]) for result in (one, other))
            agree(first, second, 1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "w1", "label": "great"}, "'great': the model has no such label. Its 3 are bad, good, mixed"),
        ({"text": "w1", "label": 3}, "label=3: the model has no such label"),
        ({"prompt": "w1", "completion": "w2"}, "'completion': a classifier is asked about a text"),
        ("", "0 tokens"),
        (" ".join(["w1"] * 20), "20 tokens: the model reads 1 to 16"),
    ],
)
def test_inputs_that_are_not_a_classifiers_are_refused(asked: Any, value: Any, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        asked(value)


def test_settings_of_generate_are_refused(asked: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokens: no option of a classifier"):
        asked("w1", max_new_tokens=3)


def test_saved_classifier_is_loaded_by_name(asked: Any, tmp_path: Path) -> None:
    asked.model.save_pretrained(tmp_path)
    loaded = AutoModelForAttribution.from_pretrained(tmp_path)
    assert type(loaded) is GPT2ForSequenceClassification
    assert ask(loaded.eval(), asked.bank)("w3 w7")["label"] == asked("w3 w7")["label"]
