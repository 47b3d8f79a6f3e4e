"""The demo from end to end on a model of a few thousand parameters, and data sets as users bring them."""

import io
import json
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console

from hf_fwdattr.demo.base import BaseSettings, build_base
from hf_fwdattr.demo.dataset import first_words, load_rows
from hf_fwdattr.demo.facts import load_world
from hf_fwdattr.demo.removal import RANDOM
from hf_fwdattr.demo.run import run_demo
from hf_fwdattr.errors import QueryError


ROWS = [{"said": f"The capital of place {i} is town {i}.", "by": f"book {i % 3}"} for i in range(12)]


def build(folder: Path) -> None:
    world = load_world()
    settings = BaseSettings(vocabulary=300, width=16, layers=1, heads=2, epochs=1)
    build_base(world.lessons[:64], world.prose[:16], folder, settings, quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.filterwarnings("default")  # what others deprecate is looked after where the core is tested
def test_own_model_and_rows_end_in_tables_a_page_and_results(base: Path, rows: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    results = run_demo(
        tmp_path / "out", model=str(base), dataset=str(rows), text_column="said", source_column="by", epochs=1,
        prompts=["The capital of place 3 is", "The capital"], max_new_tokens=4, top_k=2, check=True, quiet=True,
        console=Console(file=printed, width=100),
    )  # fmt: skip
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [answer["prompt"] for answer in results["answers"]] == ["The capital of place 3 is", "The capital"]
    for answer in results["answers"]:
        assert len(answer["proponents"]) + len(answer["opponents"]) > 0
        assert {source for source, _ in answer["sources"]} == {"book 0", "book 1", "book 2"}
        assert all(len(row["token_scores"]) == len(answer["tokens"]) for row in answer["proponents"])
    assert [line["method"] for line in results["removal"]][-1] == RANDOM
    assert results["recall"] == []
    assert (tmp_path / "out" / "adapter" / "fwdattr" / "bank.json").exists()
    page = (tmp_path / "out" / "demo.html").read_text()
    assert "book 1" in page
    assert "Are the answers lost" in page
    assert "book 1" in printed.getvalue()


def test_the_base_model_is_the_same_every_time(base: Path, tmp_path: Path) -> None:
    build(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_rows_come_from_files_and_saved_folders(rows: Path, tmp_path: Path) -> None:
    texts, sources = load_rows(str(rows), text_column="said", source_column="by", limit=2)
    assert texts == [ROWS[0]["said"], ROWS[1]["said"]]
    assert sources == ["book 0", "book 1"]
    Dataset.from_list([{"text": "a"}, {"text": "  "}, {"text": "b"}]).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(str(tmp_path / "saved")) == (["a", "b"], None)


def test_a_missing_column_and_empty_rows_are_refused_by_name(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="no column 'text'; it has said, by"):
        load_rows(str(rows))
    with pytest.raises(QueryError, match="no column 'publisher'"):
        load_rows(str(rows), text_column="said", source_column="publisher")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}')
    with pytest.raises(QueryError, match=r"no row of .*empty"):
        load_rows(str(empty))


def test_first_words_are_spread_over_the_rows() -> None:
    texts = [f"{i} a b c d e f g h" for i in range(40)]
    assert [prompt.split()[0] for prompt in first_words(texts)] == ["0", "10", "20", "30"]
    assert len(first_words(texts)[0].split()) == 8
    assert first_words(["only one"]) == ["only one"]
