"""Datasets named on the command line: files, saved folders, missing columns."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from hf_fwdattr.cli.datasets import DatasetSource
from hf_fwdattr.errors import QueryError


ROWS = [{"said": f"The capital of place {i} is town {i}.", "by": f"book {i % 3}"} for i in range(12)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def test_texts_come_from_files_and_saved_folders(file: str, tmp_path: Path) -> None:
    texts, sources = DatasetSource(file, text_column="said").texts("by", limit=2)
    assert texts == [ROWS[0]["said"], ROWS[1]["said"]]
    assert sources == ["book 0", "book 1"]
    saved = Dataset.from_list([{"text": "a"}, {"text": "  "}, {"text": "b"}])
    saved.save_to_disk(str(tmp_path / "saved"))
    DatasetDict(test=saved).save_to_disk(str(tmp_path / "splits"))
    assert DatasetSource(str(tmp_path / "saved")).texts() == (["a", "b"], None)
    assert DatasetSource(str(tmp_path / "splits"), "test").texts() == (["a", "b"], None)


def test_missing_columns_splits_and_texts_are_refused_by_name(file: str, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="no column 'text'; it has said, by"):
        DatasetSource(file).texts()
    with pytest.raises(QueryError, match="no column 'publisher'"):
        DatasetSource(file, text_column="said").texts("publisher")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}')
    with pytest.raises(QueryError, match=r"no row of .*empty"):
        DatasetSource(str(empty)).texts()
    DatasetDict(test=Dataset.from_list([{"text": "a"}])).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(QueryError, match="no split 'train'; it has test"):
        DatasetSource(str(tmp_path / "splits")).load()
