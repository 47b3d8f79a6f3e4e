from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_fwdattr.bank.tensors import read_tensors
from hf_fwdattr.errors import BankError, UnsupportedError
from hf_fwdattr.response.captures import FLOATS, CaptureFolder, Captures, CaptureWriter
from hf_fwdattr.trainer.record import Record, Snapshot


def recorded(steps: int = 6, segments: int = 2, **changes: float) -> Record:
    """Return a record whose step t has rate (t + 1) / 10 and sees rows t and t + 1, each with weight 1 / 4."""
    record = Record(steps, segments, total=steps + 1, **changes)  # type: ignore[arg-type]
    for step in range(steps):
        record.add((step + 1) / 10, torch.tensor([step, step + 1]), torch.full((2,), 0.25, dtype=torch.float64))
        if record.due(step + 1):
            record.snapshots.append(Snapshot(step + 1, torch.full((3,), float(step + 1)), torch.ones(3)))
    return record


def end(step: int) -> Snapshot:
    return Snapshot(step, torch.full((3,), 99.0), torch.full((3,), 2.0))


@given(st.integers(1, 200), st.integers(1, 12))
def test_segments_cover_a_run_once_with_one_snapshot_each(steps: int, segments: int) -> None:
    record = Record(steps, segments)
    bounds = record.bounds()
    assert [step for start, stop in bounds for step in range(start, stop)] == list(range(steps))
    assert len(bounds) == min(steps, segments)
    due = [step for step in range(1, steps + 1) if record.due(step)]
    assert [sum(start < step <= stop for step in due) for start, stop in bounds] == [1] * len(bounds)


def test_segments_have_their_own_rates_rows_and_snapshot() -> None:
    first, second = recorded().build(7, end(6))
    assert first.horizon.length == pytest.approx(0.1 + 0.2 + 0.3)
    assert second.horizon.length == pytest.approx(0.4 + 0.5 + 0.6)
    sums = torch.tensor([0.1, 0.3, 0.5, 0.3, 0, 0, 0], dtype=torch.float64) / 4
    torch.testing.assert_close(first.row_weights, sums / 0.6)
    assert (float(first.theta[0]), float(second.theta[0])) == (1.0, 4.0)
    assert bool((first.row_weights[4:] == 0).all())


def test_momentum_scales_segment_lengths() -> None:
    plain, heavy = recorded().build(7, end(6)), recorded(momentum=0.75).build(7, end(6))
    assert [s.horizon.length for s in heavy] == pytest.approx([4 * s.horizon.length for s in plain])
    assert all(torch.equal(a.row_weights, b.row_weights) for a, b in zip(plain, heavy, strict=True))


def captured(path: Path, record: Record) -> Captures:
    """Gradients of the record's visits, the number of which is in each."""
    folder = CaptureFolder(path / "captures", 3, FLOATS)
    folder.create()
    writer, number = CaptureWriter(folder, 0), 0
    for step, (rate, rows) in enumerate(zip(record.rates, record.rows, strict=True), record.first):
        if rate:
            writer.add(step, rows, torch.arange(number, number + len(rows)).float()[:, None].expand(-1, 3))
            number += len(rows)
    writer.write()
    return Captures(folder)


@pytest.mark.parametrize("first", [0, 10])
def test_visits_of_captured_gradients_have_their_steps_rates(tmp_path: Path, first: int) -> None:
    """What remains of a segment after a step is the optimizer time of its later steps."""
    record = recorded(momentum=0.5)
    record.first, record.steps, record.clips[1], record.rates[4] = first, first + 6, 0.5, 0.0
    captures = captured(tmp_path, record)
    assert record.fits(captures)
    one, two = record.build(7, end(first + 6), captures=captures)
    assert one.visits is not None
    assert two.visits is not None
    assert one.visits.rows.tolist() == [0, 1, 1, 2, 2, 3]
    assert one.visits.rates.tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.6, 0.6])  # twice rate times clip
    assert one.visits.remaining.tolist() == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.0, 0.0])
    assert two.visits.rows.tolist() == [3, 4, 5, 6]
    assert two.visits.remaining.tolist() == pytest.approx([1.2, 1.2, 0.0, 0.0])
    assert captures.read(two.visits.captured)[:, 0].tolist() == [6, 7, 8, 9]
    (early,) = record.build(7, end(first + 2), captures=captures)
    assert early.visits is not None
    assert early.visits.remaining.tolist() == pytest.approx([0.2, 0.2, 0.0, 0.0])


def test_captures_of_other_visits_do_not_fit(tmp_path: Path) -> None:
    record = recorded()
    captures = captured(tmp_path, record)
    fewer, other, ids = recorded(steps=5), recorded(), recorded()
    other.rows[3] = torch.tensor([3, 5])
    ids.rows = [10 * rows + 7 for rows in ids.rows]  # ids of a stream keep the rows' order
    assert [one.fits(captures) for one in (record, fewer, other, ids)] == [True, False, False, True]


def test_segments_end_where_the_run_ended() -> None:
    """Stopped after step 4 of 6 (a best model, or early stopping): the second segment is one step long."""
    first, second = recorded().build(7, end(4))
    assert first.horizon.length == pytest.approx(0.6)
    assert second.horizon.length == pytest.approx(0.4)
    assert float(second.theta[0]) == 4.0
    (only,) = recorded().build(7, end(2))
    assert only.horizon.length == pytest.approx(0.3)
    ((lone),) = recorded(segments=1).build(7, end(1))
    assert float(lone.theta[0]) == 99.0  # its snapshot was never reached: the end stands for it
    assert float(lone.diagonal[0]) == 2.0


def test_row_weights_count_repeated_rows() -> None:
    record = Record(1, 1)
    record.add(0.5, torch.tensor([2, 2, 0]), torch.full((3,), 0.1, dtype=torch.float64))
    (segment,) = record.build(3, end(1))
    assert segment.row_weights.tolist() == pytest.approx([0.1, 0.0, 0.2])


def test_clipping_scales_the_rate_but_not_the_decay() -> None:
    plain, clipped = Record(2, 1, weight_decay=0.3), Record(2, 1, weight_decay=0.3)
    for step in range(2):
        rows, weights = torch.tensor([step]), torch.ones(1, dtype=torch.float64)
        plain.add((0.5, 0.1)[step], rows, weights)
        clipped.add(0.5, rows, weights, (1.0, 0.2)[step])
    (one,), (other,) = plain.build(2, end(2)), clipped.build(2, end(2))
    torch.testing.assert_close(one.row_weights, other.row_weights)
    assert one.horizon == other.horizon
    assert one.weight_decay * 0.6 == pytest.approx(0.3 * 0.6)
    assert other.weight_decay * 0.6 == pytest.approx(0.3 * 1.0)


def test_late_records_cover_the_remaining_steps() -> None:
    record = Record(10, 2, total=10, first=4)
    assert record.bounds() == [(4, 7), (7, 10)]
    for step in range(4, 10):
        record.add(1.0, torch.tensor([step]), torch.ones(1, dtype=torch.float64))
        if record.due(record.taken):
            record.snapshots.append(Snapshot(record.taken, torch.zeros(3), torch.ones(3)))
    assert [snapshot.step for snapshot in record.snapshots] == [5, 8]
    segments = record.build(10, end(10))
    assert [segment.row_weights.nonzero().flatten().tolist() for segment in segments] == [[4, 5, 6], [7, 8, 9]]


def test_saved_records_take_four_bytes_per_visit(tmp_path: Path) -> None:
    record = Record(100, 1, total=10**6)
    for _ in range(100):
        record.add(0.1, torch.randint(10**6, (1000,)), torch.full((1000,), 1 / 7, dtype=torch.float64))
    record.save(tmp_path)
    assert (tmp_path / "record.safetensors").stat().st_size < 4 * 100 * 1000 + 32 * 100 + 1000


def test_records_without_a_learning_rate_are_refused() -> None:
    record = Record(2, 1)
    for _ in range(2):
        record.add(0.0, torch.tensor([0]), torch.ones(1, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="no optimizer step was recorded"):
        record.build(1, end(2))


def test_notes_of_a_bank_are_few_and_short() -> None:
    record = Record(2, 1, notes=["short", "x" * 900, *map(str, range(20))])
    notes = record.bank_notes()
    assert (len(notes), notes[0], len(notes[1]), notes[-1]) == (16, "short", 500, "and 7 more")


def test_explicit_horizon_averages_row_weights_over_steps() -> None:
    (segment,) = recorded().build(7, end(6), {"steps": 5, "step_size": 0.1})
    assert segment.horizon.length == 0.5
    assert segment.row_weights.tolist() == pytest.approx([0.25 / 6] + [0.5 / 6] * 5 + [0.25 / 6])
    assert float(segment.theta[0]) == 99.0


@pytest.mark.parametrize("ended", [False, True])
def test_records_survive_saving(tmp_path: Path, ended: bool) -> None:
    record = recorded(momentum=0.9, weight_decay=0.1)
    record.optimizer = "sgd"
    record.end = end(6) if ended else None
    record.save(tmp_path / "deep" / "record")
    again = Record.load(tmp_path / "deep" / "record")
    assert (again.steps, again.segments, again.momentum, again.weight_decay) == (6, 2, 0.9, 0.1)
    assert (again.total, again.optimizer, again.rates) == (7, "sgd", record.rates)
    for name in ("rows", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(record, name), getattr(again, name), strict=True))
    assert [snapshot.step for snapshot in again.snapshots] == [1, 4]
    assert (again.end is not None) == ended
    built, rebuilt = record.build(7, end(6)), again.build(7, again.end or end(6))
    for one, other in zip(built, rebuilt, strict=True):
        assert torch.equal(one.row_weights, other.row_weights)
        assert torch.equal(one.theta, other.theta)
    assert len(read_tensors(tmp_path / "deep" / "record" / "record.safetensors")) == 6 + 2 * (3 if ended else 2)


def test_empty_records_survive_saving_and_damage_is_refused(tmp_path: Path) -> None:
    Record(5, 2).save(tmp_path)
    assert Record.load(tmp_path) == Record(5, 2)
    (tmp_path / "record.safetensors").write_bytes(b"12345678")
    with pytest.raises(BankError, match="not a sound safetensors file"):
        Record.load(tmp_path)
