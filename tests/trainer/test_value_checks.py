"""Values of a training loop: a mismatch is refused before the first step, later noted, and never ends the training."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback

from hf_fwdattr import ResponseCallback
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.trainer.recorder import ResponseRecorder
from hf_fwdattr.trainer.value_checks import is_checked
from tests.helpers.cases import adapted, llama, padded
from tests.helpers.runs import config, trainer_for, training_set, weights


def quick(**changes: Any) -> Any:
    return config(**(dict(gradient_predictor=False, segments=1, directions=4) | changes))


def run(folder: Path, callback: ResponseCallback | None, model: Any = None, **how: Any) -> Trainer:
    kind, extra = how.pop("kind", Trainer), how.pop("extra", ())
    model = adapted(llama(torch.float32)) if model is None else model
    trainer = trainer_for(folder, model, training_set(), callback, **(dict(num_train_epochs=1) | how))
    trainer.__class__ = kind
    for one in extra:
        trainer.add_callback(one)
    return trainer


def adding(term: Callable[[Any, Any], Any]) -> type[Trainer]:
    """A Trainer whose loss has another term, of the model and its output."""

    class Adding(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, output = super().compute_loss(model, inputs, True, **kwargs)
            loss = loss + term(model, output)
            return (loss, output) if return_outputs else loss

    return Adding


def penalty_on_weights(model: Any, output: Any) -> Any:
    return 0.1 * sum(p.square().sum() for n, p in model.named_parameters() if "lora_B" in n)


def penalty_on_logits(model: Any, output: Any) -> Any:
    centred = output["logits"] - output["logits"].detach()
    return 0.1 * (centred * output["logits"].detach()).sum()  # no value, but a gradient


class TorchClipping(TrainerCallback):
    """Clipping that accelerate does not see."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(kind=adding(penalty_on_weights)), "the training loss: .* pull at the weights"),
        (dict(kind=adding(penalty_on_logits)), "the gradient at the logits"),
        (dict(kind=adding(lambda model, output: 0.01 * output["logits"].square().mean())), "the training loss"),
        (dict(extra=[TorchClipping()], max_grad_norm=0), "of what backward"),
    ],
    ids=["weights", "logits without value", "logits", "clipping by torch"],
)
def test_foreign_terms_are_refused_before_the_first_step(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    trainer = run(tmp_path, ResponseCallback(quick()), **how)
    before = weights(trainer.model)
    with pytest.raises(UnsupportedError, match=message):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_weighted_loss_of_the_model_is_refused(tmp_path: Path) -> None:
    model = adapted(llama(torch.float32))
    inner = model.get_base_model()
    plain = inner.loss_function
    inner.loss_function = lambda *args, **kwargs: plain(*args, **kwargs) + 0.05
    with pytest.raises(UnsupportedError, match="the model's loss: "):
        run(tmp_path, ResponseCallback(quick()), model).train()


def test_divisor_is_the_one_that_the_head_uses(tmp_path: Path) -> None:
    """Heads for classification ignore num_items_in_batch: each micro-batch is a mean over its own rows."""
    torch.manual_seed(0)
    lm = llama(torch.float32)
    model = LlamaForSequenceClassification(lm.config)
    model.config.pad_token_id = 0
    rows = [{"input_ids": row["input_ids"], "labels": index % 2} for index, row in enumerate(training_set())]

    def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = padded([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in some])
        return batch | {"labels": torch.tensor([row["labels"] for row in some])}

    callback = ResponseCallback(quick(source_column=None, parameters=["score"]))
    trainer_for(
        tmp_path, model, rows, callback, collate, optim="sgd", gradient_accumulation_steps=2, num_train_epochs=1
    ).train()
    record = callback.recorder.record
    assert callback.recorder.checks.loss.kind == "supervised"
    assert torch.cat(record.weights).tolist() == pytest.approx([1 / 3] * 12)


class LaterClipping(TorchClipping):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 10:
            super().on_pre_optimizer_step(args, state, control, model, **kwargs)


def test_later_mismatch_is_noted_and_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = ResponseCallback(quick())
    run(tmp_path, callback, num_train_epochs=3, max_grad_norm=0, extra=[LaterClipping()]).train()
    (note,) = callback.recorder.record.notes
    assert note.startswith("step 11: the gradient of ")
    assert callback.bank is not None
    assert callback.bank.manifest.notes == callback.recorder.record.bank_notes()
    assert note[:100] in repr(callback.bank)
    assert [message for message in caplog.messages if "scores from this training may be wrong" in message]


def test_weights_frozen_on_the_way_are_noted(tmp_path: Path) -> None:
    class Freezing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            next(p for n, p in model.named_parameters() if "lora_B" in n).requires_grad_(state.global_step < 2)

    callback = ResponseCallback(quick())
    run(tmp_path, callback, extra=[Freezing()]).train()
    (note,) = callback.recorder.record.notes
    assert "requires_grad changed while training" in note


def test_rates_that_differ_by_group_are_refused(tmp_path: Path) -> None:
    model = adapted(llama(torch.float32))
    tracked = [p for n, p in model.named_parameters() if "lora_B" in n]
    optimizer = torch.optim.SGD([{"params": tracked[:3]}, {"params": tracked[3:]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
    with pytest.raises(UnsupportedError, match="rate of parameter group 1"):
        run(tmp_path, ResponseCallback(quick()), model, optimizers=(optimizer, schedule)).train()


@pytest.mark.parametrize("name", ["_record_step", "snapshot", "_merge"])
def test_error_of_the_recording_leaves_the_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=3)
    torch.manual_seed(1)
    plain = run(tmp_path / "plain", None, **how)
    plain.train()
    real = getattr(ResponseRecorder, name)

    def failing(self: ResponseRecorder, *args: Any) -> Any:
        if self.guard.training:
            raise ZeroDivisionError("broken")
        return real(self, *args)

    monkeypatch.setattr(ResponseRecorder, name, failing)
    callback = ResponseCallback(quick())
    torch.manual_seed(1)
    trainer = run(tmp_path / "b", callback, **how)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert torch.equal(weights(trainer.model), weights(plain.model))
    with pytest.raises(ZeroDivisionError, match="broken"):
        callback.bank  # noqa: B018
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    model: Any = trainer.model
    assert not model._forward_hooks
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_frozen_weight_has_response_zero(tmp_path: Path, optim: str) -> None:
    model, callback = adapted(llama(torch.float32)), ResponseCallback(quick(directions="exact"))
    trainer = run(tmp_path, callback, model, optim=optim)
    trainer.create_optimizer()
    name, weight = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    weight.requires_grad_(False)
    trainer.train()
    bank, recorder = callback.bank, callback.recorder
    assert bank is not None
    blocks = recorder.parameters.split(bank.directions(torch.float64)[: bank.manifest.directions])
    sizes = dict(zip(recorder.parameters.live, (float(block.norm()) for block in blocks), strict=True))
    assert sizes[name] < 1e-6 * max(sizes.values())


def test_training_that_begins_again_warns_of_lost_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = ResponseCallback(quick())
    trainer = run(tmp_path, callback)
    trainer.train()
    assert not [message for message in caplog.messages if "earlier steps" in message]
    trainer.train()
    assert [message for message in caplog.messages if "4 earlier steps have moved" in message]
    assert callback.recorder.record.notes == ["4 earlier steps of this model are not in the record"]


def test_second_callback_is_refused(tmp_path: Path) -> None:
    trainer = run(tmp_path, ResponseCallback(quick()), extra=[ResponseCallback(quick())])
    with pytest.raises(UnsupportedError, match="more than one ResponseCallback"):
        trainer.train()
    with pytest.raises(UnsupportedError, match="more than one ResponseCallback"):
        ResponseCallback(quick()).add_to(trainer)


def test_checked_steps_grow_rare() -> None:
    assert [step for step in range(2000) if is_checked(step)] == [0, 10, 100, 1000]
