"""Training sets checked and shown beside a bank, and what a bank leaves out on request."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from hf_fwdattr import ResponseBank, ResponseConfig, build_bank
from hf_fwdattr.errors import MismatchError, QueryError, UnsupportedError
from tests.helpers.cases import adapted, padded
from tests.helpers.runs import ask, base, config, fine_tune, queries, training_set


QUERY = {"prompt": "w3 w4", "completion": " w5 w6"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder, model = tmp_path_factory.mktemp("run"), adapted(base())
    fine_tune(folder, model)
    return model, folder / "fwdattr"


def streamed(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def test_bank_of_sources_only_names_no_row(made: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = made
    again = adapted(base())
    fine_tune(tmp_path, again, config(private_rows=True))
    bank, full = ResponseBank.from_pretrained(tmp_path), ResponseBank(folder)
    assert bank.manifest.privacy.rows == "sources"
    assert (len(bank), bank.manifest.lines) == (12, 3)
    assert not torch.cat(list(bank.row_hashes())).any()
    assert sum(len(ids) for ids, _, _ in bank.coordinates()) == 3
    attribute = ask(again, bank)
    answer = attribute(QUERY)
    assert answer["examples"] == []
    for one, other in zip(answer["sources"], ask(model, full)(QUERY)["sources"], strict=True):
        assert one["source"] == other["source"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    with pytest.raises(QueryError, match="keeps sources only and has no rows to score; use source_scores"):
        attribute.scores(queries())
    with pytest.raises(MismatchError, match="keeps sources only, so no dataset can be checked"):
        attribute(QUERY, dataset=training_set())
    with pytest.raises(ValueError, match=r"private_rows=True keeps sources only\. Name them with source_column"):
        ResponseConfig(private_rows=True)


@pytest.mark.parametrize("chosen", [True, "text"])
def test_stored_text_is_shown_without_the_dataset(tmp_path: Path, chosen: bool | str) -> None:
    model, data = adapted(base()), training_set()
    fine_tune(tmp_path, model, config(include_text=chosen))
    bank = ResponseBank.from_pretrained(tmp_path)
    assert bank.manifest.privacy.text
    assert bank.texts(range(len(data))) == data["text"]
    examples = ask(model, bank)(QUERY, top_k=3)["examples"]
    assert [example["example"] for example in examples] == [{"text": data["text"][e["row"]]} for e in examples]
    (best, _) = ask(model, bank)(QUERY, top_k=1, dataset=data)["examples"]
    assert best["example"] == data[best["row"]]  # a given dataset takes precedence


def test_include_text_is_refused_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"private_rows=True keeps no rows\. Choose one"):
        ResponseConfig(private_rows=True, source_column="source", include_text=True)
    with pytest.raises(ValueError, match="include_text=''"):
        ResponseConfig(include_text="")
    with pytest.raises(UnsupportedError, match="include_text='words': the dataset has the columns"):
        fine_tune(tmp_path, adapted(base()), config(include_text="words"))
    horizon = {"steps": 10, "step_size": 0.01, "damping": 0.0}
    with pytest.raises(UnsupportedError, match="include_text=True decodes the rows and there is no tokenizer"):
        build_bank(adapted(base()), training_set(), config(include_text=True, horizon=horizon), data_collator=padded)


def test_bank_holds_no_text_by_default(made: tuple[Any, Path]) -> None:
    data = training_set()
    stored = b"".join(path.read_bytes() for path in made[1].iterdir())
    assert not [text for text in data["text"] if text.encode() in stored]
    tokens = [torch.tensor(ids).numpy().astype(kind).tobytes() for ids in data["input_ids"] for kind in ("<i8", "<i4")]
    assert not [row for row in tokens if row in stored]


def test_row_hashes_differ_between_banks(made: tuple[Any, Path], tmp_path: Path) -> None:
    fine_tune(tmp_path, adapted(base()))
    one, other = ResponseBank(made[1]), ResponseBank.from_pretrained(tmp_path)
    assert one.salt != other.salt
    first, second = ({bytes(line.tolist()) for part in bank.row_hashes() for line in part} for bank in (one, other))
    assert len(first) == len(second) == 12
    assert not first & second


def test_stream_is_verified_and_shown(made: tuple[Any, Path]) -> None:
    model, folder = made
    attribute, data = ask(model, ResponseBank(folder)), training_set()
    rows = list(data)
    expected = attribute(QUERY, dataset=data, top_k=2)["examples"]
    assert attribute(QUERY, dataset=streamed(rows), top_k=2)["examples"] == expected
    with pytest.raises(MismatchError, match="row 1 of the dataset is not the row that was trained on"):
        attribute(QUERY, dataset=streamed([rows[0], rows[2], *rows[2:]]))
    with pytest.raises(MismatchError, match="the dataset ends after 11 rows and the bank does not"):
        attribute(QUERY, dataset=streamed(rows[:-1]))
    with pytest.raises(MismatchError, match="the bank has 12 rows and the dataset more"):
        attribute(QUERY, dataset=streamed([*rows, rows[0]]))
    with pytest.raises(QueryError, match="its rows have no 'input_ids' but 'text', and no usual way"):
        attribute(QUERY, dataset=streamed([{"text": "w1"}]))


def test_a_sample_of_rows_can_be_verified(made: tuple[Any, Path]) -> None:
    model, folder = made
    attribute, data = ask(model, ResponseBank(folder)), training_set()
    rows = list(data)
    assert attribute(QUERY, dataset=data, verify_dataset=3)["examples"]
    swapped = [rows[1], rows[0], *rows[2:]]
    with pytest.raises(MismatchError, match="row 0 of the dataset is not"):
        attribute(QUERY, dataset=swapped, verify_dataset=3)
    middle = [*rows[:3], rows[4], rows[3], *rows[5:]]
    assert attribute(QUERY, dataset=middle, verify_dataset=2)["examples"]
    with pytest.raises(MismatchError, match="row 3 of the dataset is not"):
        attribute(QUERY, dataset=middle)
    with pytest.raises(MismatchError, match="the bank has 12 rows and the dataset 11"):
        attribute(QUERY, dataset=rows[:-1], verify_dataset=3)
    assert ask(model, ResponseBank(folder), allow_mismatch=["dataset"])(QUERY, dataset=middle)["examples"]
