"""The programs and the notebook in scripts/examples run as they stand, and show what they promise."""

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hub_world import World


FOLDER = Path(__file__).parents[2] / "scripts" / "examples"
# trl 1.16 asks transformers and torch for things by their old names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder with the examples on the path, as `python scripts/examples/NAME.py` has them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)


def run(name: str, *arguments: str) -> Any:
    """Return what the `main` of an example returns."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](list(arguments))


def test_a_chat_answer_comes_from_the_row_that_holds_it(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("sft_chat")
    assert result["generated_text"].strip() == "N'Djamena"
    assert result["examples"][0]["row"] == 0
    assert result["sources"][0]["source"] == "Gazetteer"
    assert "What is the capital of Chad?" in capsys.readouterr().out


def test_mislabelled_rows_are_among_the_most_suspicious() -> None:
    assert {3, 14, 25, 36, 47} <= set(run("label_noise")[:10])


def test_credit_goes_to_the_source_of_each_fact(tmp_path: Path) -> None:
    run("source_credit", "--output", str(tmp_path / "credit.csv"))
    with (tmp_path / "credit.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    best = {line["line"]: line["source"] for line in reversed(lines)}  # the highest score of an output comes first
    assert best == {"0": "Gazetteer", "1": "Almanac", "2": "Handbook", "3": "Reader"}


def test_a_loop_over_accelerate_makes_a_bank(tmp_path: Path) -> None:
    bank = run("accelerate_loop", "--output", str(tmp_path / "run"))
    assert len(bank) == 12
    assert bank.manifest.sources == ["Almanac", "Gazetteer", "Handbook", "Reader"]


def test_a_bank_on_the_hub_answers_offline(hub: World) -> None:
    run("offline_hub", "me/tiny", "--push")
    online = run("offline_hub", "me/tiny")
    hub.offline()
    offline = run("offline_hub", "me/tiny")
    assert offline == online
    assert offline["generated_text"].strip() == "Lord Rayleigh"
    assert offline["examples"][0]["example"]["text"] == "Who discovered argon? Lord Rayleigh"


def test_the_notebook_runs_from_top_to_bottom() -> None:
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(json.loads((FOLDER / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert namespace["result"]["generated_text"].strip() == "N'Djamena"
    assert namespace["scores"].argmax(dim=1).tolist() == list(range(12))
