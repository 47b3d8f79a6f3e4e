"""TRL's SFTTrainer: its data, its loss, its packing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_fwdattr import ResponseCallback
from hf_fwdattr.errors import MismatchError, UnsupportedError
from tests.helpers.cases import adapted
from tests.helpers.reference import agree
from tests.helpers.runs import ask, base, config, queries, tokenizer, trainer_for


# trl 1.16 asks transformers 5.23 for activation checkpointing, and torch for other things, by their old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def conversations(kind: str, count: int = 12) -> Dataset:
    """Prompts and completions, or the same as chats."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{token}" for token in torch.randint(2, 20, (count,), generator=generator).tolist())

    rows: list[dict[str, Any]] = []
    for index in range(count):
        prompt, completion = words(2 + index % 3), words(2 + index % 4)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        pair = {"prompt": prompt, "completion": f" {completion}"}
        rows.append(
            (pair if kind == "pairs" else {"messages": messages}) | {"number": 50 - index, "source": "ab"[index % 2]}
        )
    return Dataset.from_list(rows)


def tuned(folder: Path, kind: str, settings: Any = None, given: Any = None, **changes: Any) -> Any:
    """(trainer, callback) after an SFT run; `given` is the callback's dataset."""
    from trl import SFTConfig, SFTTrainer

    how: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=3, num_train_epochs=3, learning_rate=1e-2, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", max_length=16, logging_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=3,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=adapted(base()), args=SFTConfig(**(how | changes)), train_dataset=conversations(kind),
        processing_class=tokenizer(),
    )  # fmt: skip
    callback = ResponseCallback(settings or config(row_id_column="number"), given).add_to(trainer)
    trainer.train()
    return trainer, callback


@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_sft_trainer_gives_the_bank_of_the_plain_trainer(tmp_path: Path, kind: str) -> None:
    """The trainer's own tokenized rows, and its own collator, in transformers' Trainer: the same training and bank."""
    trainer, callback = tuned(tmp_path / "sft", kind)
    assert callback.bank is not None
    data = trainer.train_dataset
    if kind == "pairs":
        assert any(labels[0] == -100 for labels in data["labels"])
    assert next(callback.bank.coordinates())[0].tolist() == conversations(kind)["number"]
    tokens = torch.tensor([sum(label != -100 for label in labels[1:]) for labels in data["labels"]]).double()
    record = callback.recorder.record
    for rows, weights in zip(record.rows, record.weights, strict=True):
        assert float(weights @ tokens[rows]) == pytest.approx(1.0, abs=1e-6) or kind == "chats"
    model, plain = adapted(base()), ResponseCallback(config(row_id_column="number"))
    masked = data.map(lambda row: {"labels": [-100, *row["labels"][1:]]})
    trainer_for(tmp_path / "plain", model, masked, plain, trainer.data_collator).train()
    scores, expected = ask(trainer.model, callback.bank).scores(queries()), ask(model, plain.bank).scores(queries())
    if kind == "pairs":
        agree(scores, expected, 1e-3)


@pytest.mark.parametrize("columns", [["number", "source"], ["messages", "number", "source"]])
def test_rows_that_the_trainer_shuffles_keep_their_source_and_id(tmp_path: Path, columns: list[str]) -> None:
    given = conversations("chats").select_columns(columns)
    trainer, callback = tuned(tmp_path, "chats", given=given, shuffle_dataset=True, num_train_epochs=1)
    shuffled = trainer.train_dataset
    assert shuffled["number"] != given["number"]
    ids, sources, _ = next(callback.bank.coordinates())
    assert ids.tolist() == shuffled["number"]
    assert [callback.bank.manifest.sources[source] for source in sources.tolist()] == shuffled["source"]


def test_rows_in_another_order_than_the_trainers_are_refused(tmp_path: Path) -> None:
    how: dict[str, Any] = dict(shuffle_dataset=True, num_train_epochs=1)
    other = conversations("pairs").shuffle(seed=99)
    with pytest.raises(MismatchError, match=r"shuffle_dataset=True\) shuffles them\): row \d+ is another there"):
        tuned(tmp_path, "pairs", given=other, **how)
    unlike = [{"id": index} for index in range(12)]
    with pytest.raises(MismatchError, match="no column that both have tells the rows apart"):
        tuned(tmp_path, "pairs", config(row_id_column="id", source_column=None), unlike, **how)


def test_padding_free_rows_are_recorded(tmp_path: Path) -> None:
    """padding_free lays a batch's rows behind each other; the passes then take one row at a time."""
    _, whole = tuned(tmp_path / "padded", "pairs")
    _, flat = tuned(
        tmp_path / "flat", "pairs", config(row_id_column="number", batch_size=1), padding_free=True, max_length=None
    )
    assert [r.tolist() for r in flat.recorder.record.rows] == [r.tolist() for r in whole.recorder.record.rows]
    for one, other in zip(flat.recorder.record.weights, whole.recorder.record.weights, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(packing=True), "Set packing=False"),
        (dict(loss_type="dft"), "weighs some tokens more than others"),
    ],
)
def test_packing_and_weighted_tokens_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        tuned(tmp_path, "pairs", **changes)


def test_preference_training_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A DPO row is a pair of outputs and its loss no likelihood of either."""
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "w1 w2", "chosen": f" w{i}", "rejected": f" w{i + 1}"} for i in range(3, 9)]
    settings = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=16,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=adapted(base()), args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
        callbacks=[ResponseCallback(config(source_column=None))],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="compares outputs with those of a reference"):
        trainer.train()
