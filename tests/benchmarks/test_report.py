"""Tables, pictures, cards and RESULTS.md are made from the result files."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.report import pages, pictures, results
from benchmarks.report.catalogue import RESULTS
from benchmarks.report.tables import table

from hf_fwdattr.evaluation.agreement import agreement


ROWS = [
    {"method": "a|b", "LDS": 0.81234, "low": 0.7, "high": 0.9, "s": "-"},
    {"method": "c", "LDS": 0.5, "low": 0.4, "high": 0.6, "s": 2},
]


def test_columns_ranges_and_the_best_value() -> None:
    assert table(ROWS, "method as who; LDS:2 **; low..high 95 %; s").splitlines() == [
        "| who | LDS | 95 % | s |", "|---|---|---|---|",
        "| a\\|b | **0.81** | 0.700 to 0.900 |  |", "| c | 0.50 | 0.400 to 0.600 | 2 |",
    ]  # fmt: skip
    assert table(ROWS).startswith("| method | LDS | low | high | s |")


def test_unknown_columns_are_refused() -> None:
    with pytest.raises(KeyError, match="no row has 'speed'"):
        table(ROWS, "speed")


def test_report_says_what_is_stale_and_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.protocols import report

    path = tmp_path / "a" / "README.md"
    monkeypatch.setattr(report, "pages", lambda: iter([(path, "new\n")]))
    assert report.run(check=True) == 1
    assert not path.exists()
    assert report.run() == 0
    assert report.run(check=True) == 0
    path.write_text("old")
    assert report.run(check=True) == 1


def test_results_and_cards_of_this_repository_are_fresh() -> None:
    found = dict(pages.pages())
    assert sorted(found) == sorted(
        [*(pages.ROOT / "model_cards").glob("*/README.md"), pages.ROOT / "scripts" / "benchmarks" / "RESULTS.md"]
    )
    for path, text in found.items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: run `python -m benchmarks report`"


def test_every_result_file_is_in_the_catalogue_and_shown() -> None:
    names = {path.stem for path in results.FOLDER.glob("*.json")}
    assert names == set(RESULTS)
    text = (pages.ROOT / "scripts" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert all(f"results/{name}.json" in text for name in names)
    drawn = {path.stem for path in results.FOLDER.glob("*.png")}
    assert drawn == {name for name, entry in RESULTS.items() if entry.picture}


def test_pictures_are_drawn_from_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: results.load_result(name) for name in RESULTS}
    for name in kept:
        (tmp_path / f"{name}.json").write_text(json.dumps(kept[name]))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    drawn = {name: entry.drawing for name, entry in RESULTS.items() if entry.drawing is not None}
    first = {draw: name for name, draw in drawn.items()}  # one of each kind
    for draw, name in first.items():
        draw(kept[name], name)
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data[:4] == b"\x89PNG"
        assert len(data) < 100_000


def test_calibration_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    found = agreement(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 2, 2]]))
    pictures.calibration({"a row": found, "a source": found}, "calibration")
    assert (tmp_path / "calibration.png").read_bytes()[:4] == b"\x89PNG"
