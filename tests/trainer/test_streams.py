"""Training sets without random access: rows are known by their ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchStream

from hf_fwdattr import ResponseCallback
from hf_fwdattr.errors import MismatchError, UnsupportedError
from hf_fwdattr.trainer.row_weights import base_loader
from hf_fwdattr.trainer.streams import IndexedStream, StreamRows, first_rows, row_id
from tests.helpers.cases import adapted
from tests.helpers.runs import ask, base, config, fine_tune, queries, trainer_for, training_set


class Stream(TorchStream):
    """Rows that can be read again and again, but only from the beginning."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_stream_with_row_ids_gives_the_bank_of_its_rows(tmp_path: Path) -> None:
    """The same batches from a map-style dataset that is read in order; ids go down where positions go up.

    Without curvature, as what is drawn for a row depends on its position.
    """
    settings = config(row_id_column="number", curvature_samples=0)
    whole = adapted(base())
    expected = fine_tune(tmp_path / "a", whole, settings, max_steps=6, train_sampling_strategy="sequential").bank
    model, callback = adapted(base()), ResponseCallback(settings)
    stream: IterableDataset = training_set().to_iterable_dataset()
    trainer_for(tmp_path / "b", model, stream, callback, max_steps=6).train()
    bank = callback.bank
    assert bank is not None
    assert expected is not None
    ids, sources, _ = next(bank.coordinates())
    assert ids.tolist() == sorted(training_set()["number"])
    assert [bank.manifest.sources[s] if s >= 0 else None for s in sources.tolist()] == training_set()["source"][::-1]
    expected_scores = ask(whole, expected).scores(queries()).flip(1)
    assert torch.allclose(ask(model, bank).scores(queries()), expected_scores, rtol=1e-6, atol=1e-9)
    assert not list(tmp_path.rglob("*.arrow"))


def test_resumed_stream_gives_the_same_bank(tmp_path: Path) -> None:
    settings = config(row_id_column="number", capture="after")
    how: dict[str, Any] = dict(max_steps=6, save_strategy="steps", save_steps=3)
    scores = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model, callback = adapted(base()), ResponseCallback(settings)
        trainer_for(tmp_path, model, Stream(training_set().to_list()), callback, **how).train(resume)
        scores.append(ask(model, callback.bank).scores(queries()))
    assert torch.equal(*scores)


def test_stream_without_row_ids_is_refused(tmp_path: Path) -> None:
    stream = Stream(training_set().to_list())
    with pytest.raises(UnsupportedError, match="the training set is a stream"):
        fine_tune(tmp_path, adapted(base()), config(), stream, max_steps=3)
    with pytest.raises(UnsupportedError, match="must be whole numbers"):
        fine_tune(tmp_path, adapted(base()), config(row_id_column="text"), stream, max_steps=3)
    with pytest.raises(UnsupportedError, match="Name one of them"):
        fine_tune(tmp_path, adapted(base()), config(row_id_column="nowhere"), stream, max_steps=3)
    with pytest.raises(UnsupportedError, match="must have a whole number"):
        row_id(stream.rows[0], "text")
    with pytest.raises(UnsupportedError, match="has no length"):
        base_loader(DataLoader(iter([1])))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["seven", 1 << 70])
def test_bad_row_id_after_the_first_step_leaves_the_training_alone(tmp_path: Path, bad: Any) -> None:
    rows = training_set().to_list()
    rows[7]["number"] = bad
    callback = ResponseCallback(config(row_id_column="number"))
    trainer = trainer_for(tmp_path, adapted(base()), Stream(rows), callback, max_steps=4)
    assert trainer.train().global_step == 4
    with pytest.raises(UnsupportedError, match="no whole number there"):
        callback.bank  # noqa: B018


def test_stream_rows_are_kept_in_the_order_of_their_ids() -> None:
    rows = [{"n": n, "input_ids": [n] * 3} for n in (7, 3, 9, 3, 5)]
    assert first_rows(Stream(rows), 2) == rows[:2]
    assert list(IndexedStream(Stream(rows), "n")) == [(row, row["n"]) for row in rows]
    assert row_id({"n": torch.tensor(5)}, "n") == row_id({"n": np.int64(5)}, "n") == 5
    kept = StreamRows(Stream(rows), "n", [9, 3])
    assert kept.dataset["input_ids"] == [[3] * 3, [9] * 3]
    with pytest.raises(MismatchError, match="row 4 was trained on"):
        StreamRows(Stream(rows), "n", [4])
