"""The callback in a real Trainer: it changes nothing, refuses early, and loses nothing when it fails late."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

import hf_fwdattr.bank.tensors
from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig, build_bank
from hf_fwdattr.errors import BankError, MismatchError, NumericalError, QueryError, UnsupportedError
from hf_fwdattr.trainer.callback import RECORD, refuse_trainer
from hf_fwdattr.trainer.record import Record
from tests.helpers.cases import adapted, gpt2, padded, token_rows
from tests.helpers.reference import agree
from tests.helpers.runs import ROWS, ask, base, config, fine_tune, losses, queries, trainer_for, training_set, weights


SHARDS = 5  # bank.json, directions of rows and of sources, coordinates, error projections


def scores(model: nn.Module, bank: Any) -> Tensor:
    return ask(model, bank).scores(queries())


def drawing(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    torch.rand(3)
    return padded(rows)


@pytest.mark.parametrize(
    "how",
    [{}, dict(optim="sgd", gradient_accumulation_steps=2), dict(dataloader_num_workers=1), dict(collate=drawing)],
    ids=["AdamW", "SGD, accumulated", "workers", "collator that draws random numbers"],
)
def test_training_is_unchanged_to_the_last_bit(tmp_path: Path, how: dict[str, Any]) -> None:
    """With dropout on, so that one random number more or less would show."""
    ends, losses, states = [], [], []
    for callback in (None, ResponseCallback(config())):
        torch.manual_seed(5)
        model = adapted(gpt2(torch.float32)).train()
        trainer = trainer_for(tmp_path, model, training_set(), callback, **how)
        losses.append(trainer.train().training_loss)
        ends.append(weights(model))
        states.append(torch.get_rng_state())
    assert torch.equal(ends[0], ends[1])
    assert losses[0] == losses[1]
    assert torch.equal(states[0], states[1])


def test_bank_lies_beside_the_model_and_nothing_else_is_left(tmp_path: Path) -> None:
    model = adapted(base()).train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    callback = fine_tune(tmp_path, model)
    assert {path.name for path in tmp_path.iterdir()} == {"fwdattr"}
    assert len(list((tmp_path / "fwdattr").iterdir())) == SHARDS
    bank = ResponseBank.from_pretrained(tmp_path)
    assert bank.manifest == callback.bank.manifest  # type: ignore[union-attr]
    assert bank.manifest.weights == callback.recorder.parameters.fingerprint(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert not model._forward_pre_hooks


def test_row_ids_and_sources_come_from_their_columns(tmp_path: Path) -> None:
    data = training_set()
    bank = fine_tune(tmp_path, adapted(base()), config(row_id_column="number")).bank
    assert bank is not None
    ids, sources, _ = next(bank.coordinates())
    assert ids.tolist() == data["number"]
    assert [None if s < 0 else bank.manifest.sources[s] for s in sources.tolist()] == data["source"]


def test_rows_may_be_plain_dictionaries(tmp_path: Path) -> None:
    data = training_set()
    model = adapted(base())
    one = scores(model, fine_tune(tmp_path / "a", model, dataset=data).bank)
    model = adapted(base())
    other = scores(model, fine_tune(tmp_path / "b", model, dataset=data.to_list()).bank)
    assert torch.equal(one, other)


class Stop(Exception):
    """An exception that tests raise inside training."""


@pytest.mark.parametrize(
    ("settings", "how", "error", "message"),
    [
        ({}, dict(optim="adagrad"), UnsupportedError, "torch's SGD. Set TrainingArguments"),
        ({}, dict(compute_loss_func=lambda *_, **__: 0), UnsupportedError, "compute_loss_func"),
        (dict(parameters="nothing_like_it"), {}, UnsupportedError, "selects no weight"),
        (dict(parameters=[r"wte"]), {}, UnsupportedError, "is not trained by the optimizer"),
        (dict(source_column="publisher"), {}, UnsupportedError, "source_column='publisher'"),
        (dict(row_id_column="source"), {}, UnsupportedError, "whole numbers"),
        (dict(objective="sequence"), {}, UnsupportedError, "fits no known likelihood"),
    ],
)
def test_unsupported_runs_are_refused_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any], how: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = adapted(base())
    before = weights(model)
    with pytest.raises(error, match=message):
        fine_tune(tmp_path, model, config(**settings), **how)
    assert torch.equal(weights(model), before)


def test_adam_with_coupled_decay_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = adapted(base())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    with pytest.raises(UnsupportedError, match="Use AdamW, or weight_decay=0"):
        fine_tune(tmp_path, model, optimizers=(optimizer, None))


def test_random_collator_is_refused(tmp_path: Path) -> None:
    def masked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded(rows)
        return batch | {"input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.3, 1, batch["input_ids"])}

    with pytest.raises(UnsupportedError, match="another 'input_ids' each time"):
        fine_tune(tmp_path, adapted(base()), collate=masked)


def test_dataset_for_sources_must_have_the_training_rows(tmp_path: Path) -> None:
    callback = ResponseCallback(config(), dataset=training_set(ROWS + 1))
    with pytest.raises(MismatchError, match=f"{ROWS + 1} rows and {ROWS} are trained on"):
        trainer_for(tmp_path, adapted(base()), training_set(), callback).train()
    callback = ResponseCallback(config(), dataset=training_set().select(range(ROWS)[::-1]))
    with pytest.raises(MismatchError, match="not in the order of those that are trained on: row 0 is another"):
        trainer_for(tmp_path, adapted(base()), training_set(), callback).train()


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("args", "n_gpu", 2, "DataParallel over 2 GPUs"),
        ("trainer", "is_deepspeed_enabled", True, "DeepSpeed keeps weights"),
    ],
)
def test_data_parallel_and_deepspeed_are_refused(
    tmp_path: Path, where: str, name: str, value: Any, message: str
) -> None:
    trainer = trainer_for(tmp_path, adapted(base()), training_set(), None)
    if where == "args":
        object.__setattr__(trainer.args, "__class__", type("Changed", (type(trainer.args),), {name: value}))
    else:
        setattr(trainer, name, value)
    with pytest.raises(UnsupportedError, match=message):
        refuse_trainer(trainer.args, trainer, config())


def test_diverged_run_keeps_its_result_and_record_and_makes_no_bank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(base(torch.float32))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    callback = ResponseCallback(config())
    result = trainer_for(tmp_path, model, training_set(), callback, max_grad_norm=0).train()
    assert result.global_step == 12
    assert {path.name for path in tmp_path.iterdir()} == {f"_{RECORD}"}
    with pytest.raises(NumericalError, match="Was the loss NaN"):
        callback.bank  # noqa: B018
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "Was the loss NaN" in message
    assert f"record='{tmp_path}/_{RECORD}'" in message
    with pytest.raises(NumericalError, match="Was the loss NaN"):
        build_bank(model, training_set(), config(), data_collator=padded, record=tmp_path / f"_{RECORD}")


def test_full_disk_leaves_the_old_bank_and_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The call that the log names completes the bank as it stands there."""
    old = fine_tune(tmp_path, adapted(base())).bank
    assert old is not None
    model, callback = adapted(base()), ResponseCallback(config())
    trainer = trainer_for(tmp_path, model, training_set(), callback, learning_rate=2e-2)
    real = hf_fwdattr.bank.tensors.save_file

    def full(tensors: dict[str, Tensor], path: str, **more: Any) -> None:
        if "coordinates" in tensors:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(hf_fwdattr.bank.tensors, "save_file", full)
        trainer.train()
    with pytest.raises(OSError, match="No space left"):
        callback.bank  # noqa: B018
    assert ResponseBank.from_pretrained(tmp_path).manifest == old.manifest
    assert len(list((tmp_path / "fwdattr").iterdir())) == SHARDS
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    call = message.partition("Complete the bank with ")[2].splitlines()[0]
    assert "data_collator=trainer.data_collator" in call
    finished = eval(call, {"build_bank": build_bank, "trainer": trainer, "config": config()})
    undisturbed = adapted(base())
    bank = fine_tune(tmp_path / "undisturbed", undisturbed, learning_rate=2e-2).bank
    assert torch.equal(scores(model, finished), scores(undisturbed, bank))
    assert finished.manifest.optimizer == "adamw"


class InterruptingCollator:
    """A collator that presses Ctrl-C after some batches."""

    def __init__(self) -> None:
        self.left = 10**9

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return padded(rows)


@pytest.mark.parametrize("batches", [1, 4, 15])
def test_bank_interrupted_in_its_passes_can_be_completed(tmp_path: Path, batches: int) -> None:
    collate, settings = InterruptingCollator(), config(segments=2, directions=8)
    model = adapted(base()).train()
    trainer = trainer_for(tmp_path, model, training_set(), None, collate)

    class InterruptedCallback(ResponseCallback):
        """A callback that is interrupted in its passes."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.before = weights(model), torch.get_rng_state()
            collate.left = batches
            super().on_train_end(*args, **kwargs)

    callback = InterruptedCallback(settings)
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(weights(model), callback.before[0])
    assert torch.equal(torch.get_rng_state(), callback.before[1])
    assert model.training
    assert {p.requires_grad for n, p in model.named_parameters() if "lora" in n} == {True}
    assert not (tmp_path / "fwdattr" / "bank.json").exists()
    bank = build_bank(model, training_set(), settings, data_collator=padded, record=tmp_path / f"_{RECORD}")
    again = adapted(base())
    undisturbed = fine_tune(tmp_path / "undisturbed", again, settings).bank
    assert torch.equal(scores(model, bank), scores(again, undisturbed))


def test_run_interrupted_while_training_can_start_again(tmp_path: Path) -> None:
    collate = InterruptingCollator()
    callback, model = ResponseCallback(config()), adapted(base())
    trainer = trainer_for(tmp_path, model, training_set(), callback, collate)
    collate.left = 8
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    fresh = adapted(base())
    trainer_for(tmp_path, fresh, training_set(), callback, collate).train()
    again = adapted(base())
    assert torch.equal(scores(fresh, callback.bank), scores(again, fine_tune(tmp_path / "b", again).bank))


@pytest.mark.parametrize(("moved", "added"), [(False, False), (True, False), (True, True)])
def test_resumed_run_gives_the_same_bank(tmp_path: Path, moved: bool, added: bool) -> None:
    """Stopped at step 5 of 12, in the middle of a segment, and resumed by the objects of another process."""
    whole = adapted(base())
    expected = scores(whole, fine_tune(tmp_path / "whole", whole).bank)
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=5)

    class Killed(ResponseCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 6:
                raise Stop

    folder = tmp_path / "run"
    with pytest.raises(Stop):
        trainer_for(folder, adapted(base()), training_set(), Killed(config()), **how).train()
    checkpoint = folder / "checkpoint-5"
    if moved:
        checkpoint = checkpoint.rename(tmp_path / "elsewhere")
    model, callback = adapted(base()), ResponseCallback(config())
    trainer = trainer_for(folder, model, training_set(), None if added else callback, **how)
    if added:
        callback.add_to(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if moved else True)
    assert torch.equal(weights(model), weights(whole))
    assert torch.equal(scores(model, callback.bank), expected)


def test_run_resumed_without_a_record_gives_the_bank_of_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows count for what they did from step 5 on: as in a record of those steps alone."""
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=5)
    trainer_for(tmp_path, adapted(base()), training_set(), None, **how).train()
    model, callback = adapted(base()), ResponseCallback(config(segments=1, capture="after"))
    trainer = trainer_for(tmp_path, model, training_set(), callback, **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.bank is not None
    assert callback.bank.manifest.run.model_dump() == {"steps": 12, "first": 5, "label_smoothing": 0.0}
    assert [message for message in caplog.messages if "from here on only" in message]
    record, rates = callback.recorder.record, [1e-2 * (1 - step / 12) for step in range(5, 12)]
    assert record.rates == pytest.approx(rates)
    (segment,) = callback.bank.manifest.segments
    assert segment.length == pytest.approx(sum(r * c for r, c in zip(rates, record.clips, strict=True)))
    # Going on from the checkpoint that this run made gives the same bank.
    expected = scores(model, callback.bank)
    again, later = adapted(base()), ResponseCallback(config(segments=1, capture="after"))
    trainer = trainer_for(tmp_path, again, training_set(), later, **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert torch.equal(scores(again, later.bank), expected)


def test_run_that_is_resumed_as_another_is_refused(tmp_path: Path) -> None:
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=5)
    trainer_for(tmp_path, adapted(base()), training_set(), ResponseCallback(config()), **how).train()
    path = str(tmp_path / "checkpoint-5")
    trainer = trainer_for(tmp_path, adapted(base()), training_set(11), ResponseCallback(config()), **how)
    with pytest.raises(UnsupportedError, match="began with 12 rows and is resumed with 11"):
        trainer.train(resume_from_checkpoint=path)
    other = ResponseCallback(config(parameters="lora"))
    with pytest.raises(UnsupportedError, match="tracked weights and is resumed with"):
        trainer_for(tmp_path, adapted(base()), training_set(), other, **how).train(resume_from_checkpoint=path)
    record = Record.load(tmp_path / "checkpoint-5" / RECORD)
    planned = Record(12, 3, record.momentum, record.weight_decay + 0.1, total=ROWS, optimizer=record.optimizer)
    with pytest.raises(UnsupportedError, match=r"weight_decay: the run began with 0.0 and is resumed with 0.1"):
        record.continue_as(planned, len(record.snapshots[0].theta))


@pytest.mark.parametrize("epochs", [6, 2])
def test_run_may_be_resumed_with_another_number_of_epochs(tmp_path: Path, epochs: int) -> None:
    """Under SGD with small steps the scores of all rows sum to what training changed, in both parts of the run."""
    how: dict[str, Any] = dict(optim="sgd", learning_rate=3e-3, max_grad_norm=0, save_strategy="steps", save_steps=6)
    settings = config(parameters="lora")
    trainer_for(tmp_path, adapted(base()), training_set(), ResponseCallback(settings), **how).train()
    model, callback = adapted(base()), ResponseCallback(settings)
    before = losses(model, queries())
    again = trainer_for(tmp_path, model, training_set(), callback, **(how | dict(num_train_epochs=epochs)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    record = callback.recorder.record
    assert (record.steps, len(record.rates)) == (4 * epochs, 4 * epochs)
    agree(scores(model, callback.bank).sum(1), before - losses(model, queries()), 0.03)


def test_record_of_a_checkpoint_gives_the_bank_of_the_checkpoint(tmp_path: Path) -> None:
    """The record in a checkpoint is whole: it gives the bank of a run that ended there by itself."""
    constant: dict[str, Any] = dict(lr_scheduler_type="constant")
    settings = config(segments=1)
    model = adapted(base())
    fine_tune(tmp_path, model, settings, save_strategy="steps", save_steps=8, **constant)
    record = tmp_path / "checkpoint-8" / RECORD
    with pytest.raises(MismatchError, match="ended with other weights than the model has"):
        build_bank(model, training_set(), settings, data_collator=padded, record=record)
    early = adapted(base())
    state = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert state["state"]
    early.load_adapter(str(tmp_path / "checkpoint-8"), "saved")
    early.set_adapter("saved")
    early.delete_adapter("default")
    bank = build_bank(early, training_set(), settings, data_collator=padded, record=record)
    (segment,) = bank.manifest.segments
    assert segment.length == pytest.approx(8 * 1e-2)
    assert len(bank) == ROWS


def test_bank_of_the_best_model_has_the_steps_up_to_it(tmp_path: Path) -> None:
    """The evaluation loss is made to rise after the first epoch, so the model of step 4 is loaded back."""

    class Rising(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": float(self.state.global_step)}
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    model, callback = adapted(base()), ResponseCallback(config())
    reference = trainer_for(
        tmp_path, model, training_set(), callback, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        eval_dataset=training_set(), lr_scheduler_type="constant",
    )  # fmt: skip
    reference.__class__ = Rising
    reference.train()
    assert reference.state.best_global_step == 4
    bank = callback.bank
    assert bank is not None
    assert [segment.length for segment in bank.manifest.segments] == [pytest.approx(4e-2)]
    assert bank.manifest.weights == callback.recorder.parameters.fingerprint(model)
    short = adapted(base())
    end = fine_tune(tmp_path / "short", short, config(segments=1), lr_scheduler_type="constant", num_train_epochs=1)
    agree(scores(model, bank), scores(short, end.bank), 1e-6)


def test_build_bank_makes_a_bank_without_a_record(tmp_path: Path) -> None:
    """All rows count alike, columns that the model does not take are left out, and the folder goes with the bank."""
    model = adapted(base())
    settings = config(horizon={"steps": 100, "step_size": 0.05}, row_id_column="number")
    bank = build_bank(model, training_set(), settings, data_collator=padded)
    assert scores(model, bank).shape == (4, ROWS)
    assert bank.manifest.optimizer == "none"
    kept = bank.save_pretrained(tmp_path)
    folder = bank.folder
    del bank
    assert not folder.exists()
    assert ResponseBank(kept).manifest.sources == ["east", "north", "south"]


def test_build_bank_takes_rows_of_one_length_without_a_collator() -> None:
    rows = [row for row in training_set(60).to_list() if len(row["input_ids"]) == 8]
    data = Dataset.from_list(rows).remove_columns(["labels"])
    data = data.add_column("labels", data["input_ids"])
    model = adapted(base())
    bank = build_bank(model, data, config(horizon={"steps": 10, "step_size": 0.1}))
    assert scores(model, bank).shape == (4, len(rows))


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        ([], {}, QueryError, "the dataset is empty"),
        ([*token_rows(1), {"input_ids": [1] * 20, "labels": [1] * 20}], {}, QueryError, "row 1 has 20 tokens"),
        ([*token_rows(2), {"input_ids": [1, 2, 3], "labels": [1, -7, 3]}], {}, QueryError, "row 2 has the label -7"),
        ([*token_rows(2), {"input_ids": [1, 2, 3], "labels": [1, 23, 3]}], {}, QueryError, "row 2 has the label 23"),
        (iter(token_rows(2)), {}, UnsupportedError, "has no length or no random access"),
        (token_rows(3), dict(horizon=None), UnsupportedError, "neither a record nor a horizon was given"),
    ],
    ids=["empty", "too long", "negative label", "label beyond", "stream", "no horizon"],
)
def test_bad_rows_are_named(data: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    given = dict(horizon={"steps": 10, "step_size": 0.1}, source_column=None) | settings
    model = adapted(base())
    before = weights(model)
    with pytest.raises(error, match=message):
        build_bank(model, data, config(**given), data_collator=padded)
    assert torch.equal(weights(model), before)


def test_record_of_other_rows_or_weights_is_refused(tmp_path: Path) -> None:
    model, callback = adapted(base()), ResponseCallback(config())
    trainer = trainer_for(tmp_path, model, training_set(), callback, InterruptingCollator())
    trainer.train()
    record = tmp_path / "kept"
    callback.recorder.record.save(record)
    with pytest.raises(MismatchError, match="recorded on 12 rows and the dataset has 11"):
        build_bank(model, training_set(11), config(), data_collator=padded, record=record)
    with pytest.raises(MismatchError, match="other weights"):
        build_bank(adapted(base()), training_set(), config(), data_collator=padded, record=record)
    with pytest.raises(MismatchError, match="tracks other parameters"):
        build_bank(model, training_set(), config(parameters="lora"), data_collator=padded, record=record)
    with pytest.raises(BankError, match="no record of a run in"):
        build_bank(model, training_set(), config(), data_collator=padded, record=tmp_path / "nowhere")
    settings = json.loads((record / "record.json").read_text())
    (record / "record.json").write_text(json.dumps(settings | {"taken": 3}))
    with pytest.raises(BankError, match="incomplete"):
        build_bank(model, training_set(), config(), data_collator=padded, record=record)


def test_add_to_gives_the_bank_of_callbacks_without_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = adapted(base()), adapted(base())
    expected = fine_tune(tmp_path / "a", one).bank
    trainer, callback = trainer_for(tmp_path / "b", other, training_set(), None), ResponseCallback(config())
    assert callback.add_to(trainer) is callback.add_to(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    monkeypatch.setattr(hf_fwdattr.trainer.callback, "find_train_call", lambda: pytest.fail("searched"))
    trainer.train()
    assert torch.equal(scores(other, callback.bank), scores(one, expected))


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        ({}, dict(compute_loss_func=lambda *_, **__: 0), "compute_loss_func"),
        (dict(parameters="nothing_like_it"), {}, "nothing_like_it"),
    ],
)
def test_add_to_refuses_before_training(
    tmp_path: Path, settings: dict[str, Any], how: dict[str, Any], message: str
) -> None:
    trainer = trainer_for(tmp_path, adapted(base()), training_set(), None, **how)
    callback = ResponseCallback(config(**settings))
    with pytest.raises(UnsupportedError, match=message):
        callback.add_to(trainer)
    assert callback not in trainer.callback_handler.callbacks


def test_log_says_where_the_bank_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_fwdattr"):
        bank = fine_tune(tmp_path, adapted(base())).bank
    assert bank is not None
    (message,) = [message for message in caplog.messages if message.startswith("response bank: ")]
    assert f"{bank.folder} ({bank.manifest.bytes / 1e6:.1f} MB, {ROWS} rows)" in message
    assert f"pipeline('training-data-attribution', model='{tmp_path}')" in message


def test_callback_may_be_used_twice(tmp_path: Path) -> None:
    callback = ResponseCallback(config())
    trainer_for(tmp_path / "a", adapted(base()), training_set(), callback).train()
    second = adapted(base())
    trainer_for(tmp_path / "b", second, training_set(9), callback).train()
    assert callback.bank is not None
    assert len(callback.bank) == 9
    assert callback.bank.folder == tmp_path / "b" / "fwdattr"


def test_there_is_no_bank_before_training() -> None:
    assert ResponseCallback(ResponseConfig()).bank is None
