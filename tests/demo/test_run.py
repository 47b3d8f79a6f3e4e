"""The demo from end to end on a model of a few thousand parameters."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hf_fwdattr.demo.base_model import BaseSettings, build_base
from hf_fwdattr.demo.facts import load_world
from hf_fwdattr.demo.finetune import RANDOM
from hf_fwdattr.demo.run import DemoSettings, TextRows, first_words, run_demo


TEXTS = [f"The capital of place {i} is town {i}." for i in range(12)]


def build(folder: Path) -> None:
    world = load_world()
    settings = BaseSettings(vocabulary=300, width=16, layers=1, heads=2, epochs=1)
    build_base(world.lessons[:64], world.prose[:16], folder, settings, quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build(folder)
    return folder


@pytest.mark.filterwarnings("default")  # deprecations of other libraries are tested with the core
def test_demo_on_a_given_model_and_rows_writes_tables_page_and_results(base: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    settings = DemoSettings(
        model=str(base), rows=TextRows("places", TEXTS, [f"book {i % 3}" for i in range(12)]), epochs=1,
        prompts=["The capital of place 3 is", "The capital"], max_new_tokens=4, top_k=2, check=True, quiet=True,
    )  # fmt: skip
    results = run_demo(tmp_path / "out", settings, Console(file=printed, width=100))
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


def test_base_model_is_deterministic(base: Path, tmp_path: Path) -> None:
    build(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_first_words_are_of_evenly_spaced_rows() -> None:
    texts = [f"{i} a b c d e f g h" for i in range(40)]
    assert [prompt.split()[0] for prompt in first_words(texts)] == ["0", "10", "20", "30"]
    assert len(first_words(texts)[0].split()) == 8
    assert first_words(["only one"]) == ["only one"]
