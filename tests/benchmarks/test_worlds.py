"""Real protocols on tiny worlds: lines that the library's own numbers confirm, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import registry
from benchmarks.__main__ import main, parser_of
from benchmarks.methods.bank import attributed_run, kept_run
from benchmarks.protocols import leave_one_out, leave_sources_out
from benchmarks.report import results
from benchmarks.report.catalogue import RESULTS
from benchmarks.world import ClassificationWorld
from datasets import Dataset
from torch import Tensor

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds
from tests.gradients.test_other_layers import vit
from tests.helpers.reference import agree
from tests.query.test_batch import images


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache and result files in a folder of the test."""
    monkeypatch.setenv("HF_FWDATTR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path


def measured(folder: Path, words: str, result: str) -> list[dict[str, Any]]:
    """Run a measurement as on the command line, and return the rows of a result file."""
    assert main([*words.split(), "--results", str(folder)]) == 0
    rows: list[dict[str, Any]] = json.loads((folder / f"{result}.json").read_text())["rows"]
    return rows


def test_command_measures_a_tiny_world(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    words = ["-m", "benchmarks", "leave_sources_out", "--world", "tiny", "--sources", "1", "--results"]
    environment = os.environ | {"HF_FWDATTR_CACHE": str(tmp_path), "PYTHONWARNINGS": "default"}
    subprocess.run([sys.executable, *words, str(tmp_path)], cwd=SCRIPTS, env=environment, check=True)
    rows = json.loads((tmp_path / "leave_sources_out_tiny.json").read_text())["rows"]
    assert [row["source"] for row in rows] == ["source 0"]
    assert rows[0]["cosine, derivative"] > 0.8  # the source is really reweighted
    assert 0.5 < rows[0]["slope, derivative"] < 1.5


def test_listing_names_every_measurement_world_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in (*registry.protocols(), *registry.world_names(), *registry.method_names()):
        assert f"  {name} " in listed
    assert all(line for _, _, line in registry.protocols().values())
    assert main(["nothing"]) == 2


@pytest.mark.parametrize("name", [name for name, entry in RESULTS.items() if entry.command])
def test_commands_of_the_catalogue_parse(name: str) -> None:
    words = RESULTS[name].command.split()
    if words[0] == "bash":
        assert (SCRIPTS.parent / words[1]).is_file()
    elif words[0] == "bytes_per_query":
        assert words[0] in registry.protocols()  # importing it would turn this process to the server of the tests
    else:
        parser_of(words[0])[0].parse_args(words[1:])


def test_lds_of_a_tiny_world(folder: Path) -> None:
    rows = measured(folder, "lds --world tiny --halves 6 --seeds 2 --workers 1", "lds_tiny")
    by_method = {row["method"]: row for row in rows}
    assert list(by_method) == list(registry.load_world("tiny").lines)
    assert by_method["bank, exact, three segments"]["explained variance"] == pytest.approx(1.0)
    assert by_method["bank, k = 8"]["directions"] == 8
    assert all(-1 <= row["LDS"] <= 1 for row in rows)


def test_rows_left_out_of_a_tiny_world(folder: Path) -> None:
    words = "leave_one_out --world tiny --rows 2 --sources 1 --workers 1"
    rows = measured(folder, words, "leave_one_out_tiny")
    assert [row["n"] for row in rows] == [2, rows[1]["n"], 12, 1]
    assert all(abs(row["pearson"]) <= 1 for row in rows)
    assert (folder / "leave_one_out_tiny.png").read_bytes()[:4] == b"\x89PNG"


def test_budget_curve_of_a_tiny_world(folder: Path) -> None:
    words = "budget_curve --world tiny --budgets 24 31 --directions 16 --real 31 --timed 1 --depths 1"
    rows = measured(folder, words, "budget_curve_tiny")
    assert rows[0]["of the top ten"] == 1.0
    (staged,) = (row for row in rows if row["method"] == "two stages" and row["forward passes"] > 30)
    assert staged["of the top ten"] > 0.8  # nearly as many passes as rows
    assert staged["time in forwards"] > 0
    facts = json.loads((folder / "budget_curve_tiny.json").read_text())
    assert facts["top ten, full"] == pytest.approx(staged["of the top ten"], abs=0.1)  # real ones say the same
    assert facts["scores off, full"] < 0.02


def test_cost_of_a_tiny_world(folder: Path) -> None:
    rows = measured(folder, "cost --world tiny --pairs 1 --directions 4 --epochs 1", "cost_tiny")
    assert [row["what"].split(",")[0] for row in rows[:1]] == ["training and bank"]
    timed = {row["what"]: row["ratio"] for row in rows}
    assert timed["of that, curvature"] > 0
    assert timed["of that, gradient predictor"] > 0
    assert timed["training and bank, against the training"] > timed["the passes and all after training"]


def test_loop_of_a_tiny_world_is_timed_from_inside(folder: Path) -> None:
    rows = measured(folder, "cost --world tiny --loop 12 --pairs 1", "cost_loop_tiny")
    assert [row["what"].split(",")[0] for row in rows][:2] == ["before the first step", "of that"]
    assert all(row["seconds"] > 0 for row in rows[:4])
    assert rows[3]["seconds"] < rows[2]["seconds"]


def test_derivative_of_a_tiny_world_predicts_removal(folder: Path) -> None:
    rows = measured(folder, "leave_one_out_derivative --world tiny --rows 1 --workers 1", "derivative_tiny")
    assert [row["predicted by"] for row in rows][2] == "scores"
    assert rows[1]["pearson"] > 0.8


def test_kept_run_is_trained_once(folder: Path) -> None:
    world = registry.load_world("tiny")
    queries = world.token_lists()
    first = kept_run(world, directions=4).scorer().scores(queries)
    files = sorted(path.stat().st_mtime_ns for path in (folder / "cache").rglob("bank.json"))
    assert torch.equal(kept_run(world, directions=4).scorer().scores(queries), first)
    assert sorted(path.stat().st_mtime_ns for path in (folder / "cache").rglob("bank.json")) == files
    with attributed_run(world, directions=4) as run:
        agree(run.scorer().scores(queries), first, 1e-4)


class Images(ClassificationWorld):
    """A few images of noise, and a small vision transformer."""

    name = version = "images"
    training = dict(per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2)
    mislabelled = torch.arange(18) % 6 == 0

    def __init__(self) -> None:
        self.rows: Dataset = images(18)
        self.queries: Dataset = images(6, seed=5)

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return vit()


def test_bank_of_images_predicts_retraining(folder: Path) -> None:
    world = Images()
    scores = registry.make_method("bank", directions="exact", own=True).scores(world)
    assert scores.values is not None
    assert scores.own is not None
    assert scores.values.shape == (6, 18)
    assert scores.own.shape == (18,)
    assert scores.cost["directions"] == 18
    halves = random_halves(18, 10)
    outcomes = torch.stack([world.outcome(half, 1) for half in halves])
    assert lds(scores.values, halves, outcomes).mean > 0.3
    dot = registry.make_method("gradient-dot", own=True).scores(world)
    assert dot.own is not None
    assert (dot.own > 0).all()
    own = registry.make_method("row-loss").scores(world).own
    assert own is not None
    agree(own, torch.cat([world.losses(world.trained, world.rows.select([i])) for i in range(18)]), 1e-5)
    assert sum(len(batch["labels"]) for batch in world.batches(world.rows, 7)) == 18
    assert 0 <= world.accuracy(world.trained) <= 1


def test_agreement_of_sources_is_one_for_the_truth_and_turns_with_its_sign() -> None:
    real = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = leave_sources_out.agreement_of_pairs(2 * real, real)
    turned = leave_sources_out.agreement_of_pairs(-real, real)
    assert exact == {
        "Spearman, all pairs": 1.0, "per source": 1.0, "per query": 1.0, "Pearson": exact["Pearson"], "slope": 0.5,
        "greatest loser found": 1.0,
    }  # fmt: skip
    assert turned["Spearman, all pairs"] == -1.0
    assert turned["slope"] == -1.0


def test_removals_of_a_linear_world() -> None:
    """Losses rise by the scores of removed rows: the right scores cost more than random rows, and lose the gain."""
    rows, queries = 100, 3
    truth = torch.rand(5, rows, generator=torch.Generator().manual_seed(0)).double()

    def retrain(weights: Tensor, seeds: list[int], workers: int, title: str) -> Tensor:
        return ((1 - weights.double()) @ truth.T + 2.0)[None]

    world: Any = SimpleNamespace(
        rows=range(rows), seed=0, model=lambda: torch.nn.Linear(1, 1), retrain=retrain,
        losses=lambda model: torch.full((5,), 12.0),  # a gain of ten nats
    )  # fmt: skip
    lines = leave_one_out.removals(world, {"right": truth, "wrong": -truth}, queries, 1)
    by_method = {name: [line for line in lines if line["method"] == name] for name in ("right", "wrong")}
    assert [line["rows left out"] for line in by_method["right"]] == [1, 5, 10, 20]
    for right, wrong in zip(*by_method.values(), strict=True):
        expected = truth[:queries].topk(right["rows left out"], dim=1).values.sum(1)
        assert right["rise"] == pytest.approx(float(expected.mean()))
        assert right["half of the gain lost"] == pytest.approx(float((expected >= 5).double().mean()))
        assert wrong["rise"] < right["random rows"] == wrong["random rows"] < right["rise"]


def test_derivative_is_divided_by_its_step() -> None:
    """In a world whose loss falls with the square of a row's weight: removal 1, derivative 2, at any step."""

    def retrain(weights: Tensor, *_: Any, **__: Any) -> Tensor:
        return (-weights.square() @ torch.eye(6, dtype=torch.float64))[None]

    world: Any = SimpleNamespace(rows=range(6), seed=0, retrain=retrain)
    gone, exact = leave_one_out.derivatives(world, torch.tensor([4, 1]), 0.1, 1)
    expected = torch.zeros(6, 2, dtype=torch.float64)
    expected[4, 0] = expected[1, 1] = 1.0
    assert torch.allclose(gone, expected)
    assert torch.allclose(exact, 2 * expected)
