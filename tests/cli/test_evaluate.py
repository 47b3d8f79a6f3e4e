"""`hf-fwdattr evaluate` with a user's script."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_fwdattr.cli.app import app
from hf_fwdattr.trainer.publish import add_section
from tests.helpers.runs import config, saved_adapter


SETTINGS = dict(optim="sgd", learning_rate=0.05, num_train_epochs=2, max_grad_norm=0.0)
SCRIPT = """
from pathlib import Path
from tests.helpers.cases import adapted
from tests.helpers.runs import queries as asked, saved_base, trainer_for, training_set

HERE = Path({folder!r})

def make_trainer(seed):
    model = adapted(saved_base(HERE / f"base-{{seed}}"))
    return trainer_for(HERE / "runs", model, training_set(), None, seed=3 + seed, **{settings!r})

queries = asked(5)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "adapter"
    saved_adapter(path, config(parameters="lora"), **SETTINGS)
    add_section(path, "fwdattr", "me/adapter")
    (path.parent / "mine.py").write_text(SCRIPT.format(folder=str(path.parent), settings=SETTINGS))
    return path


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_measured_quality_is_in_bank_and_card(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = [
        "evaluate", adapter.parent / "mine.py", adapter, "--halves", 4, "--seeds", 2, "--rows", 4, "--sources", 2,
        "--folder", adapter.parent / "kept", "--quiet",
    ]  # fmt: skip
    code, output = call(*words)
    assert code == 0, output
    assert "leave one out" in output
    quality = json.loads((adapter / "fwdattr" / "bank.json").read_text())["quality"]
    assert quality["LDS"]["halves"] == 4
    assert quality["leave_one_out"]["spearman"] > 0.8
    assert 0.7 < quality["leave_one_out"]["slope"] < 1.4
    assert quality["sources_left_out"]["sources"] == 2
    assert quality["leave_one_out"]["replay_gap_nats"] < 1e-3
    assert f"slope {quality['leave_one_out']['slope']}" in (adapter / "README.md").read_text()
    runs = len(list((adapter.parent / "kept").iterdir()))
    assert call(*words)[0] == 0  # at once: every outcome is kept
    assert len(list((adapter.parent / "kept").iterdir())) == runs == 8 + 5 + 2


def test_script_without_trainer_is_refused(adapter: Path) -> None:
    script = adapter.parent / "empty.py"
    script.write_text("queries = []\n")
    code, output = call("evaluate", script, adapter)
    assert code == 1
    assert "does not define 'make_trainer'" in output
    code, output = call("evaluate", adapter.parent / "none.py", adapter)
    assert "there is no script" in output
