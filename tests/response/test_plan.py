"""Plans of the passes: their summary, and the passes that follow them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fwdattr import ResponseCallback, build_bank
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.response.plan import Plan
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree
from tests.helpers.runs import base, config, trainer_for, training_set


@given(st.integers(1, 10**6), st.integers(1, 8), st.integers(1, 10**6), st.integers(1, 4096), st.booleans())
def test_plans_have_at_most_two_passes_per_segment_and_one(
    rows: int, segments: int, sample_rows: int, samples: int, query_gradients: bool
) -> None:
    sample = min(sample_rows, rows)
    plan = Plan(rows, 10, [rows] * segments, min(samples, rows), sample, sample * query_gradients)
    assert plan.row_passes <= (2 * segments + 1) * rows


def test_plan_summary() -> None:
    plan = Plan(20000, 1_000_000, [20000] * 3, 4096, 2048, 2048, ranks=2)
    assert plan.summary(4 << 30, 0.02) == (
        "74,336 rows forward and backward (3.7 times the 20,000 trained on), 4.0 GiB in memory, 26.5 GiB on disk on "
        "each of 2 ranks, about 12 min at training's speed"
    )
    with_predictor = Plan(1000, 1000, [1000], 1000, 1000, 1000, predictor_rows=576, predictor_bytes=1 << 20)
    assert with_predictor.summary(1 << 30, 1.0) == (
        "3,576 rows forward and backward (3.6 times the 1,000 trained on, 576 of them for the gradient predictor), "
        "12.4 MiB in memory, about 60 min at training's speed"
    )
    assert Plan(10, 100, [10], 10, 10, 10).summary(1 << 30) == (
        "30 rows forward and backward (3.0 times the 10 trained on), 12 KiB in memory"
    )


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every batch that is read for a gradient, exact or predicted, adds its rows."""
    sizes: list[int] = []

    def observed(method: Any) -> Any:
        def call(self: Any, batch: Any, *more: Any) -> Any:
            sizes.append(len(batch["labels"]))
            return method(self, batch, *more)

        return call

    monkeypatch.setattr(PerSampleGradients, "__call__", observed(PerSampleGradients.__call__))
    monkeypatch.setattr(GradientPredictor, "_record", observed(GradientPredictor._record))
    return sizes


@pytest.mark.parametrize(
    "changes", [dict(directions=6), dict(directions=6, sample_rows=5), dict(directions="exact")], ids=str
)
def test_passes_read_as_many_rows_as_planned(
    changes: dict[str, Any], tmp_path: Path, batch_sizes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model, callback = adapted(base()), ResponseCallback(config())
    trainer_for(tmp_path, model, training_set(), callback, max_steps=4).train()
    callback.recorder.record.save(tmp_path / "record")
    for predictor in (False, True):
        batch_sizes.clear()
        settings = config(quiet=False, gradient_predictor=predictor, **changes)
        build_bank(model, training_set(), settings, data_collator=padded, record=tmp_path / "record")
        (planned,) = re.findall(r"response bank: (\d+) rows forward and backward", capsys.readouterr().err)
        check = sum(batch_sizes) - int(planned)  # a batch that checks the analytic layers
        assert 0 < check <= settings.batch_size if predictor else check == 0


def test_small_budgets_shrink_batches(tmp_path: Path, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and chunks shrink until they fit; the bank is the same to rounding."""
    settings = config(directions=6, gradient_predictor=False, capture="after")
    model, callback = adapted(base()), ResponseCallback(settings)
    trainer_for(tmp_path, model, training_set(), callback).train()
    assert callback.bank is not None
    callback.recorder.record.save(tmp_path / "record")
    monkeypatch.setattr("hf_fwdattr.response.storage._LEAST", 16 * 8 * 3 * callback.bank.manifest.size)
    batch_sizes.clear()
    settings = settings.replace(memory_budget=0, batch_size=12)
    bank = build_bank(model, training_set(), settings, data_collator=padded, record=tmp_path / "record")
    assert max(batch_sizes) == 3
    found, expected = (each.directions()[:6].double() for each in (bank, callback.bank))
    rows = [torch.cat([block.double() for _, _, block in each.coordinates()]) for each in (bank, callback.bank)]
    agree(rows[0] @ found, rows[1] @ expected, 1e-4)
    agree(found.abs(), expected.abs(), 1e-3)
