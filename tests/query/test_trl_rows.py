"""Data sets of TRL as their owner has them: trained on by a real SFTTrainer, then handed to the pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import pipeline
from trl import SFTConfig, SFTTrainer

from hf_fwdattr import ResponseCallback
from hf_fwdattr.errors import MismatchError, QueryError
from hf_fwdattr.pipeline import TASK
from hf_fwdattr.query.tokens import tokenize_input
from tests.helpers.cases import adapted
from tests.helpers.runs import base, config
from tests.query.test_tokens import CHATML, sentencepiece


# trl 1.16 asks transformers 5.23 for activation checkpointing, and torch for other things, by their old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

WORDS = ["the sky", "blue sky", "the blue", "sky is", "now the", "is blue", "the now", "blue is"]
ANSWERS = ["is blue", "now", "blue now", "the", "sky", "now is", "is", "the sky"]
TOOLS = [{"type": "function", "function": {"name": "sky", "description": "blue", "parameters": {}}}]
MASKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|bot|>{% generation %} {{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}<|user|> {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
WITH_TOOLS = "{% if tools %}{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}" + CHATML


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(kind: str) -> list[dict[str, Any]]:
    pairs = list(zip(WORDS, ANSWERS, strict=True))
    more = {"source": "a"}
    if kind == "prompt and completion":
        return [{"prompt": q, "completion": f" {a}"} | more for q, a in pairs]
    if kind == "conversational pairs":
        return [{"prompt": chat(q, a)[:1], "completion": chat(q, a)[1:]} | more for q, a in pairs]
    if kind == "messages":
        return [{"messages": [*chat("the sky", "blue"), *chat(q, a)]} | more for q, a in pairs]
    if kind == "messages with tools":
        return [{"messages": chat(q, a), "tools": json.dumps(TOOLS[: i % 2])} | more for i, (q, a) in enumerate(pairs)]
    if kind == "ShareGPT":
        turns = [[{"from": "user", "value": q}, {"from": "assistant", "value": a}] for q, a in pairs]
        return [{"conversations": turn} | more for turn in turns]
    name = {"text": "text", "another column": "words"}[kind]
    return [{name: f"{q} {a}{'</s>' * (i % 2)}"} | more for i, (q, a) in enumerate(pairs)]


def trained(folder: Path, data: Dataset, how: dict[str, Any], template: str = CHATML, **more: Any) -> tuple[Any, Any]:
    """(trainer, pipeline) after two steps of SFT."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", max_length=16, logging_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=3,
    )  # fmt: skip
    tokens = sentencepiece(pad_token="</s>")
    tokens.chat_template = template
    model = adapted(base(), target_modules=["c_attn"])
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**(settings | how)), train_dataset=data, processing_class=tokens, **more
    )
    callback = ResponseCallback(config(directions=2, source_column=None)).add_to(trainer)
    trainer.train()
    assert callback.bank is not None
    return trainer, pipeline(TASK, model=trainer.model.eval(), tokenizer=tokens, bank=callback.bank, device="cpu")


@pytest.mark.parametrize(
    ("kind", "how", "template"),
    [
        ("prompt and completion", {}, CHATML),
        ("prompt and completion", {"max_length": 4}, CHATML),
        ("conversational pairs", {"truncation_mode": "keep_end", "max_length": 5}, CHATML),
        ("conversational pairs", {"completion_only_loss": False}, CHATML),
        ("messages", {}, CHATML),
        ("messages", {"assistant_only_loss": True}, MASKED),
        ("messages with tools", {}, WITH_TOOLS),
        ("ShareGPT", {}, CHATML),
        ("text", {"max_length": 4}, CHATML),
        ("another column", {"dataset_text_field": "words"}, CHATML),
    ],
)
def test_data_set_that_trl_trained_on_is_accepted_as_it_is(
    tmp_path: Path, kind: str, how: dict[str, Any], template: str
) -> None:
    data = Dataset.from_list(rows(kind))
    trainer, attribute = trained(tmp_path, data, how, template)
    whole = how.get("max_length") is None
    for index in (0, 3):
        ids, labels = trainer.train_dataset[index]["input_ids"], trainer.train_dataset[index]["labels"]
        own = tokenize_input(attribute.tokenizer, {"input_ids": ids, "labels": labels})
        asked = (
            data[index] if "source" in data[index] and kind not in ("ShareGPT", "another column") else own._asdict()
        )
        mine = tokenize_input(attribute.tokenizer, asked)
        end = [] if mine.input_ids[-1] == ids[-1] or kind not in ("prompt and completion", "text") else [2]  # TRL's
        assert not whole or mine.input_ids + end == ids
        if "pairs" in kind or kind.startswith("prompt"):
            assert not whole or how or mine.labels + end == own.labels
        result = attribute(asked, dataset=data, top_k=8)
        assert result["token_ids"] == [label for label in mine.labels if label != -100]
        assert len(result["examples"]) == 8
        assert all(line["example"] == data[line["row"]] for line in result["examples"])
    assert attribute([data[1]["prompt"]] if "prompt" in data[1] else "the sky", dataset=data, max_new_tokens=1)


def test_shuffled_and_left_out_rows_are_shown_by_their_tokens(tmp_path: Path) -> None:
    """Rows whose completion is cut off are left out by TRL, and `shuffle_dataset` turns the others round."""
    given = rows("prompt and completion")
    given[2] = {"prompt": "the sky is blue now the sky is blue now", "completion": " now", "source": "a"}
    data = Dataset.from_list(given)
    trainer, attribute = trained(tmp_path, data, {"max_length": 9, "shuffle_dataset": True})
    assert len(trainer.train_dataset) == 7
    assert trainer.train_dataset[0]["prompt"] != data[0]["prompt"]
    for line in attribute(data[0], dataset=data, top_k=7)["examples"]:
        expected = trainer.train_dataset[line["row"]]
        assert {name: expected[name] for name in ("prompt", "source")} == {
            name: line["example"][name] for name in ("prompt", "source")
        }
    for wrong in (data.select(range(7)), data.remove_columns(["completion"])):
        with pytest.raises((MismatchError, QueryError), match="dataset"):
            attribute(data[0], dataset=wrong)


def test_chats_that_a_formatting_function_rendered_are_found(tmp_path: Path) -> None:
    """TRL takes what the function returns for a text: it gets a second beginning, and an end."""
    given = [{"dialog": row["messages"]} for row in rows("messages")]
    data, tokens = Dataset.from_list(given), sentencepiece()

    def rendered(example: dict[str, Any]) -> str:
        return str(tokens.apply_chat_template(example["dialog"], tokenize=False))

    _, attribute = trained(tmp_path, data, {"max_length": 15}, formatting_func=rendered)
    for same in (data, given, IterableDataset.from_generator(lambda: iter(given))):
        for line in attribute("the sky", dataset=same, top_k=2, max_new_tokens=1)["examples"]:
            assert line["example"] == data[line["row"]]
    _, attribute = trained(tmp_path / "other", data, {}, formatting_func=lambda row: row["dialog"][0]["content"])
    with pytest.raises(QueryError, match=r"as by a formatting_func\. Pass the tokenized training set"):
        attribute("the sky", dataset=data)
