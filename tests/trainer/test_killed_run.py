"""kill -9 at random moments: afterwards there is the old bank, the new one, or clearly none, and the run resumes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_kill_leaves_the_old_bank_the_new_one_or_none(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed_run", str(tmp_path / "work"), str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(out.read_text())
    states = [tuple(line) for line in report["passes"]["states"]]
    assert {state for _, state in states} <= {"old", "new", "none"}
    assert Counter(how for how, _ in states)["killed"] >= 50
    assert {state for how, state in states if how == "killed"} >= {"old", "none"}
    assert report["passes"]["last"][1] == "none"
    assert report["passes"]["last"][0] < 0
    assert report["passes"]["same"]
    assert report["passes"]["stray"] == 0
    saved = [tuple(line) for line in report["saves"]["states"]]
    assert {state for _, state in saved} == {"ok"}
    assert Counter(how for how, _ in saved)["killed"] >= 10
    assert report["saves"]["stray"] == 0
