"""What is said before the passes is what they then do."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fwdattr import ResponseCallback, build_bank
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.layers.activations import PredictorActivations
from hf_fwdattr.response.plan import Plan
from tests.helpers.cases import adapted, padded
from tests.helpers.runs import base, config, trainer_for, training_set


@given(st.integers(1, 10**6), st.integers(1, 8), st.integers(1, 10**6), st.integers(1, 4096), st.booleans())
def test_passes_are_at_most_two_per_segment_and_one(
    rows: int, segments: int, chosen: int, samples: int, query_gradients: bool
) -> None:
    plan = Plan(rows, 10, segments, min(samples, rows), min(chosen, rows), query_gradients)
    assert plan.row_passes <= (2 * segments + 1) * rows


def test_a_plan_in_words() -> None:
    plan = Plan(20000, 1_000_000, 3, 4096, 2048, True, ranks=2)
    assert plan.summary(4 << 30, 0.02) == (
        "74,336 rows forward and backward (3.7 times the 20,000 trained on), 4.0 GiB in memory, 26.5 GiB on disk on "
        "each of 2 ranks, about 12 min at training's speed"
    )
    look = Plan(1000, 1000, 1, 1000, 1000, look=576, look_bytes=1 << 20)
    assert look.summary(1 << 30, 1.0) == (
        "3,576 rows forward and backward (3.6 times the 1,000 trained on, 576 of them for the first look), 12.4 MiB "
        "in memory, about 60 min at training's speed"
    )
    assert Plan(10, 100, 1, 10, 10).summary(1 << 30) == (
        "30 rows forward and backward (3.0 times the 10 trained on), 12 KiB in memory"
    )


@pytest.mark.parametrize(
    "changes", [dict(directions=6), dict(directions=6, sample_rows=5), dict(directions="exact")], ids=str
)
def test_as_many_rows_are_read_as_was_said(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, callback = adapted(base()), ResponseCallback(config())
    trainer_for(tmp_path, model, training_set(), callback, max_steps=4).train()
    callback.recorder.record.save(tmp_path / "record")
    read, real = [0], PerSampleGradients.__call__

    def counted(self: PerSampleGradients, batch: Any, *more: Any) -> Any:
        read[0] += len(batch["labels"])
        return real(self, batch, *more)

    monkeypatch.setattr(PerSampleGradients, "__call__", counted)
    traced = PredictorActivations.__init__

    def watched(self: PredictorActivations, model: Any, objective: Any, head: Any, batch: Any, *more: Any) -> None:
        read[0] += len(batch["labels"])
        traced(self, model, objective, head, batch, *more)

    monkeypatch.setattr(PredictorActivations, "__init__", watched)
    for look in (False, True):
        read[0] = 0
        settings = config(quiet=False, gradient_predictor=look, **changes)
        build_bank(model, training_set(), settings, data_collator=padded, record=tmp_path / "record")
        (said,) = re.findall(r"response bank: (\d+) rows forward and backward", capsys.readouterr().err)
        assert read[0] == int(said) + (settings.batch_size if look else 0)  # a batch that checks blocks written out


def test_a_small_budget_makes_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and chunks shrink until what is in flight fits; the bank is the same to rounding."""
    model, callback = adapted(base()), ResponseCallback(config(directions=6))
    trainer_for(tmp_path, model, training_set(), callback).train()
    assert callback.bank is not None
    callback.recorder.record.save(tmp_path / "record")
    monkeypatch.setattr("hf_fwdattr.response.passes._LEAST", 16 * 8 * 3 * callback.bank.manifest.size)
    sizes, real = [], PerSampleGradients.__call__

    def seen(self: PerSampleGradients, batch: Any, *more: Any) -> Any:
        sizes.append(len(batch["labels"]))
        return real(self, batch, *more)

    monkeypatch.setattr(PerSampleGradients, "__call__", seen)
    settings = config(directions=6, memory_budget=0, batch_size=12)
    bank = build_bank(model, training_set(), settings, data_collator=padded, record=tmp_path / "record")
    assert max(sizes) == 3
    torch.testing.assert_close(bank.directions().abs(), callback.bank.directions().abs(), rtol=1e-4, atol=1e-6)
