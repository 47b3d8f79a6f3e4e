"""Classifiers by name: an adapter of a sequence classifier, its trained head included, from a folder and the Hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    default_data_collator,
    pipeline,
)

from hf_fwdattr import AutoModelForAttribution, ResponseBank, ResponseCallback
from hf_fwdattr.pipeline import TASK
from tests.helpers.hub_world import World
from tests.helpers.runs import arguments, ask, base, config, fine_tune, saved_adapter, tokenizer
from tests.query.test_classifiers import classifier


NAMES = ["bad", "good", "mixed"]
ROWS = [
    {"input_ids": [1 + (i * 5 + t) % 22 for t in range(6)], "labels": i % 3, "source": f"s{i % 2}"} for i in range(9)
]
ASKED: list[Any] = ["w3 w7", {"text": "w1 w4 w9", "label": 1}]
SEQ_CLS = {"task_type": "SEQ_CLS"}
HEAD = {"modules_to_save": ["score"]}


def adapted(model: Any, **changes: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **changes))


def same(one: Any, other: Any) -> None:
    for first, second in zip(one(ASKED, top_k=9), other(ASKED, top_k=9), strict=True):
        assert [row["row"] for row in first["examples"]] == [row["row"] for row in second["examples"]]
        scores, expected = ([row["score"] for row in result["examples"]] for result in (first, second))
        assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("parameters", ["lora_B", "trainable"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [("classifier", SEQ_CLS), ("causal", SEQ_CLS), ("causal", HEAD), ("classifier", {})],
    ids=["task", "task on a causal base", "head on a causal base", "base is a classifier"],
)
def test_adapter_of_a_classifier_is_loaded_from_its_folder(
    tmp_path: Path, kind: str, how: dict[str, Any], parameters: str
) -> None:
    (classifier() if kind == "classifier" else base(torch.float32)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    more = {} if kind == "classifier" else {"num_labels": 3, "pad_token_id": 0}
    model = adapted(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **more), **how)
    run = tmp_path / "run"
    data = Dataset.from_list(ROWS)
    bank = fine_tune(run, model, config(parameters=parameters), data, collate=default_data_collator).bank
    model.save_pretrained(run)
    live = ask(model.eval(), bank)
    named = pipeline(TASK, model=str(run), device="cpu")
    assert type(named.model) is GPT2ForSequenceClassification
    assert any("score.modules_to_save" in name for name, _ in named.model.named_parameters()) == bool(how)
    assert named("w3 w7")["label"] in (NAMES if kind == "classifier" else ["LABEL_0", "LABEL_1", "LABEL_2"])
    same(named, live)
    loaded = AutoModelForAttribution.from_pretrained(run)  # without the config that transformers hands down
    same(pipeline(TASK, model=loaded, tokenizer=tokenizer(), device="cpu"), live)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("saved", ["lm_head", "wte", "ln_f"])
def test_adapter_of_a_language_model_keeps_its_class_and_saved_modules(tmp_path: Path, saved: str) -> None:
    base(torch.float32).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), modules_to_save=[saved])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForAttribution.from_pretrained(tmp_path).eval()
    assert type(loaded) is GPT2LMHeadModel
    ids = torch.tensor([[3, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapter_of_a_classifier_is_loaded_from_the_hub_and_offline(hub: World, tmp_path: Path) -> None:
    """The base on the Hub is a language model: classes and head are the adapter's alone."""
    base(torch.float32).push_to_hub("me/base")
    tokenizer().push_to_hub("me/base")
    raw = AutoModelForSequenceClassification.from_pretrained("me/base", num_labels=3, pad_token_id=0)
    model = adapted(raw, **SEQ_CLS)
    trainer = Trainer(
        model=model, args=arguments(tmp_path / "run", hub_model_id="me/labels"), train_dataset=Dataset.from_list(ROWS),
        data_collator=default_data_collator, processing_class=tokenizer(), callbacks=[ResponseCallback(config())],
    )  # fmt: skip
    trainer.train()
    live = ask(model.eval(), ResponseBank.from_pretrained(tmp_path / "run"))
    trainer.push_to_hub()
    expected = live("w3 w7")
    shutil.rmtree(tmp_path / "run")
    hub.clean()
    for _ in range(2):
        named = pipeline(TASK, model="me/labels", device="cpu")
        assert type(named.model) is GPT2ForSequenceClassification
        assert named.model.config.num_labels == 3
        result = named("w3 w7")
        assert result["label"] == expected["label"]
        assert [row["row"] for row in result["examples"]] == [row["row"] for row in expected["examples"]]
        hub.offline()


def test_config_that_the_caller_gives_is_not_changed(tmp_path: Path) -> None:
    base(torch.float32).save_pretrained(tmp_path / "base")
    raw = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5, pad_token_id=0)
    adapted(raw, **SEQ_CLS).save_pretrained(tmp_path)
    given = AutoConfig.from_pretrained(tmp_path / "base")
    assert AutoModelForAttribution.from_pretrained(tmp_path, config=given).config.num_labels == 5
    assert given.num_labels == 2


def test_adapter_of_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter")
    assert type(AutoModelForAttribution.from_pretrained(tmp_path / "adapter")) is GPT2LMHeadModel
