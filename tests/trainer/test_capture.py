"""Gradients captured while training: the scores they give, when they are refused, what a resumed run keeps of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from hf_fwdattr import ResponseCallback, build_bank
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.capture import CapturedBatch, GradientCapture
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.batch import batch_scores
from hf_fwdattr.query.scorer import Scorer
from hf_fwdattr.response.captures import CaptureFolder, Captures, chosen_bits
from hf_fwdattr.trainer import capture as capture_module
from hf_fwdattr.trainer.record import CAPTURES, END_RECORD, Record
from tests.helpers.cases import adapted, llama, padded
from tests.helpers.reference import agree
from tests.helpers.runs import base, config, fine_tune, queries, trainer_for, training_set, weights


def scores(model: Any, callback: ResponseCallback, **changes: Any) -> Tensor:
    """(queries, rows)."""
    assert callback.bank is not None
    model.eval()
    return torch.stack([batch_scores(model, callback.bank, padded([query]), CAUSAL_LM)[0] for query in queries()])


def tuned(folder: Path, capture: str, **how: Any) -> tuple[Tensor, Tensor]:
    """(scores, weights) of a run."""
    settings = how.pop("settings", {})
    model = adapted(base())
    callback = fine_tune(folder, model, config(capture=capture, **settings), **how)
    assert not (folder / END_RECORD).exists()
    return scores(model, callback), weights(model)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"optim": "sgd", "learning_rate": 1e-3},
        {"max_grad_norm": 0.05},
        {"activation_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"dataloader_num_workers": 2},
        {"settings": {"averaging": "trajectory"}},
        {"settings": {"directions": 8, "sample_rows": 6}},
    ],
    ids=str,
)
def test_small_steps_give_the_scores_of_the_passes(tmp_path: Path, how: dict[str, Any]) -> None:
    """With a small learning rate the weights hardly move, and a step's gradient is that at the snapshot."""
    how = {"learning_rate": 1e-5} | how
    (one, theta), (other, captured_theta) = (
        tuned(tmp_path / name, name, **dict(how)) for name in ("after", "training")
    )
    assert torch.equal(theta, captured_theta)
    agree(other, one, 0.02)


def test_pushes_sum_to_the_way_that_the_weights_went(tmp_path: Path) -> None:
    """Under SGD without curvature, the responses of all rows are exactly what training did to the weights."""
    model = adapted(base())
    start = weights(model, "auto")
    callback = fine_tune(
        tmp_path, model, config(capture="training", curvature_samples=0), optim="sgd", learning_rate=0.1,
        max_grad_norm=0.5,
    )  # fmt: skip
    assert callback.bank is not None
    responses = torch.cat([block.double() for _, _, block in callback.bank.coordinates()])
    responses = responses @ callback.bank.directions(torch.float64)[: callback.bank.manifest.directions]
    agree(responses.sum(0), weights(model, "auto") - start, 1e-5)


def test_sources_of_private_rows(tmp_path: Path) -> None:
    found = []
    for capture in ("after", "training"):
        model = adapted(base())
        settings = config(capture=capture, directions=8, private_rows=True)
        callback = fine_tune(tmp_path / capture, model, settings, learning_rate=1e-5)
        assert callback.bank is not None
        found.append(Scorer(callback.bank, model.eval()).source_scores(queries()))
    agree(found[1], found[0], 0.02)


def captured_steps(folder: Path) -> list[int]:
    return Captures(CaptureFolder.open(folder / END_RECORD / CAPTURES)).steps.unique().tolist()


def test_resumed_run_continues_its_captures(tmp_path: Path) -> None:
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=5, learning_rate=1e-2)
    whole, _ = tuned(tmp_path / "whole", "training", **how)
    model = adapted(base())
    callback = ResponseCallback(config(capture="training"))
    trainer = trainer_for(tmp_path / "cut", model, training_set(), callback, **how)
    with pytest.raises(KeyboardInterrupt):
        stop_at(trainer, 7)
    assert captured_steps(tmp_path / "cut")[-1] >= 4
    again = adapted(base())
    callback = ResponseCallback(config(capture="training"))
    trainer = trainer_for(tmp_path / "cut", again, training_set(), callback, **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    agree(scores(again, callback), whole, 1e-6)


def test_gradients_of_another_run_in_the_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the same steps and rows began in the folder, and was stopped before it saved."""
    monkeypatch.setattr("hf_fwdattr.response.captures._HELD", 0)
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=5)
    for rate, saved in ((1e-2, 5), (0.3, 50)):
        trainer = trainer_for(
            tmp_path, adapted(base()), training_set(), ResponseCallback(config()), learning_rate=rate,
            save_strategy="steps", save_steps=saved,
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            stop_at(trainer, 7)
    callback = ResponseCallback(config(capture="training"))
    trainer = trainer_for(tmp_path, adapted(base()), training_set(), callback, learning_rate=1e-2, **how)
    with pytest.raises(UnsupportedError, match="captured before step 5 are not in"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("warmup", [0, 4])
def test_first_steps_that_move_weights_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: int
) -> None:
    """During a warm-up the first rate is zero; what is compared then has to hold at once, too."""
    compared: list[int] = []
    refuse = GradientCapture.refuse_other_totals

    def counted(capture: GradientCapture, found: list[CapturedBatch]) -> None:
        compared.append(sum(bool(one.totals) for one in found))
        refuse(capture, found)

    monkeypatch.setattr(GradientCapture, "refuse_other_totals", counted)
    tuned(tmp_path, "training", warmup_steps=warmup, learning_rate=1e-2)
    assert compared == [1] * (3 if warmup else 2) + [0] * (7 if warmup else 8) + [1, 0]


def test_gradients_that_wait_for_a_step_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_fwdattr.trainer.capture._LEAST_HELD", 4 * 432 * 3 * 2)  # two micro-batches of three rows
    settings = {"memory_budget": 0, "parameters": "auto"}
    tuned(tmp_path / "two", "training", gradient_accumulation_steps=2, settings=settings)
    assert "no longer captured" not in caplog.text
    tuned(tmp_path / "four", "auto", gradient_accumulation_steps=4, settings=settings)
    assert "no longer captured: the gradients of 9 rows take" in caplog.text


class Sideways(nn.Module):
    """A model whose layers have positions before rows, as many as there are rows in a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(23, 6), nn.Linear(6, 6), nn.Linear(6, 23)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        hidden = self.layer(self.embedding(input_ids).transpose(0, 1)).transpose(0, 1)
        logits = self.head(hidden)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, 23)
        return CausalLMOutput(loss=loss, logits=logits)


def test_layers_with_positions_first_are_left_to_the_passes(tmp_path: Path) -> None:
    rows: Any = [{"input_ids": [1 + (i + 3 * t) % 22 for t in range(6)]} for i in range(12)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    model = Sideways()
    settings = config(capture="training", parameters="linear", source_column=None, gradient_predictor=False)
    with pytest.raises(UnsupportedError, match=r"capture='training': layer\.weight is not the weight of one Linear"):
        fine_tune(tmp_path, model, settings.replace(objective="causal-lm"), rows)


def stop_at(trainer: Any, step: int) -> None:
    """Train until a step, and go away as a killed process does."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    trainer.train()


def test_missing_captures_of_a_resumed_run_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = dict(save_strategy="steps", save_steps=5)
    tuned(tmp_path, "training", **how)  # leaves checkpoints, and no captures
    for capture in ("auto", "training"):
        callback = ResponseCallback(config(capture=capture, quiet=False))
        trainer = trainer_for(tmp_path, adapted(base()), training_set(), callback, **how)
        if capture == "training":
            with pytest.raises(UnsupportedError, match="captured before step 5 are not in"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
            assert "the passes after training take the rows' gradients: the gradients" in capsys.readouterr().err
            assert callback.bank is not None


def test_bank_is_completed_from_a_record_with_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = adapted(base()), config(capture="training")
    callback = ResponseCallback(settings)
    trainer = trainer_for(tmp_path, model, training_set(), callback)
    with monkeypatch.context() as patched:
        patched.setattr("hf_fwdattr.trainer.recorder.respond", lambda *_: 1 / 0)
        trainer.train()
    with pytest.raises(ZeroDivisionError):
        _ = callback.bank
    record = tmp_path / END_RECORD
    assert Record.load(record).taken == 12
    made = build_bank(model, training_set(), settings, data_collator=padded, record=record, folder=tmp_path / "made")
    whole, _ = tuned(tmp_path / "whole", "training")
    model.eval()
    found = torch.stack([batch_scores(model, made, padded([query]), CAUSAL_LM)[0] for query in queries()])
    agree(found, whole, 1e-6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tied embedding": (dict(parameters="trainable"), "is not the weight of one Linear layer alone"),
    "a horizon": (dict(horizon={"steps": 3.0, "step_size": 0.1}), "with a horizon of your own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_or_left_to_the_passes(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(UnsupportedError, match=rf"capture='training': .*{reason}.* Set capture='auto'"):
        fine_tune(tmp_path, base(), config(capture="training", **settings), weight_decay=0.0)
    callback = fine_tune(tmp_path, base(), config(quiet=False, **settings), weight_decay=0.0)
    assert callback.bank is not None
    assert reason in capsys.readouterr().err


def test_full_disk_costs_no_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_fwdattr.response.captures._HELD", 0)
    monkeypatch.setattr("hf_fwdattr.response.captures.CaptureWriter.write", fails)
    found, theta = tuned(tmp_path / "auto", "auto")
    assert "no longer captured: [Errno 28] No space left on device. The passes after training" in caplog.text
    expected, other = tuned(tmp_path / "after", "after")
    assert torch.equal(theta, other)
    assert torch.equal(found, expected)
    with pytest.raises(UnsupportedError, match=r"capture='training': .*No space left"):
        tuned(tmp_path / "training", "training")


def test_no_room_is_known_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "chosen_bits", lambda size, visits, free: chosen_bits(size, visits, 1000))
    with pytest.raises(UnsupportedError, match=r"capture='training': 36 gradients of [\d,]+ numbers take .* GiB"):
        tuned(tmp_path, "training")
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_give_nearly_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    exact, _ = tuned(tmp_path / "floats", "training")
    monkeypatch.setattr(capture_module, "chosen_bits", lambda *_: bits)
    coded, _ = tuned(tmp_path / "coded", "training")
    assert float(torch.corrcoef(torch.stack([coded.flatten(), exact.flatten()]))[0, 1]) > {1: 0.8, 2: 0.9}.get(
        bits, 0.98
    )


def test_dropout_is_part_of_what_was_pushed(tmp_path: Path) -> None:
    """With dropout, responses without curvature still sum to the way that the weights went."""
    model = adapted(llama(), lora_dropout=0.3)
    start = weights(model, "lora")
    callback = fine_tune(
        tmp_path, model, config(capture="training", curvature_samples=0, parameters="lora"), optim="sgd",
        learning_rate=0.01, max_grad_norm=0,
    )  # fmt: skip
    assert callback.bank is not None
    responses = torch.cat([block.double() for _, _, block in callback.bank.coordinates()])
    responses = responses @ callback.bank.directions(torch.float64)[: callback.bank.manifest.directions]
    agree(responses.sum(0), weights(model, "lora") - start, 1e-5)
