"""Tables of Markdown files are made from result files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tables import FILES, ROOT, rendered


RESULT = {
    "title": "t", "rows": [{"method": "a|b", "LDS": 0.81234, "low": 0.7, "high": 0.9, "s": "-"},
                           {"method": "c", "LDS": 0.5, "low": 0.4, "high": 0.6, "s": 2}],
    "wall_s": 12, "machine": "2 cores",
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "lds.json").write_text(json.dumps(RESULT))
    return tmp_path


def block(spec: str, body: str = "old\n") -> str:
    return f"Before.\n<!-- table: {spec} -->\n{body}<!-- /table -->\nAfter.\n"


def test_columns_ranges_and_the_best_value(results: Path) -> None:
    text = rendered(block("lds | method as who; LDS:2 **; low..high 95 %; s"), results)
    assert text.splitlines() == [
        "Before.", "<!-- table: lds | method as who; LDS:2 **; low..high 95 %; s -->", "",
        "| who | LDS | 95 % | s |", "|---|---|---|---|",
        "| a\\|b | **0.81** | 0.700 to 0.900 |  |", "| c | 0.50 | 0.400 to 0.600 | 2 |", "", "<!-- /table -->",
        "After.",
    ]  # fmt: skip


def test_all_columns_and_facts(results: Path) -> None:
    text = rendered(block("lds + facts"), results)
    assert "| method | LDS | low | high | s |" in text
    assert "wall s 12; machine 2 cores" in text


def test_a_second_time_nothing_changes(results: Path) -> None:
    once = rendered(block("lds") + block("lds | LDS"), results)
    assert rendered(once, results) == once
    assert once.count("<!-- /table -->") == 2


def test_columns_and_files_that_are_not_there(results: Path) -> None:
    with pytest.raises(KeyError, match="no row has 'speed'"):
        rendered(block("lds | speed"), results)
    with pytest.raises(FileNotFoundError):
        rendered(block("other"), results)


def test_check_fails_where_a_table_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(block("lds_lora | method; LDS **"))
    command = [sys.executable, str(ROOT / "scripts" / "tables.py"), str(path)]
    assert subprocess.run([*command, "--check"]).returncode == 1
    assert "old" in path.read_text()
    assert subprocess.run(command).returncode == 0
    assert subprocess.run([*command, "--check"]).returncode == 0
    assert "| method | LDS |" in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_the_tables_of_this_repository_are_fresh(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert rendered(text) == text
