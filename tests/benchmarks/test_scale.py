"""The measurement `scale`: its exact scores against responses that are really there, and a tiny run of its steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import registry, scale_configuration, truth
from benchmarks.__main__ import main
from benchmarks.meters import PeakMemory, Phases
from benchmarks.protocols import scale
from benchmarks.report import results
from benchmarks.scale_configuration import Configuration
from benchmarks.scale_steps import STEPS
from torch import Tensor

from hf_fwdattr import ResponseConfig
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.response.storage import Storage
from hf_fwdattr.trainer.build_context import BuildContext
from hf_fwdattr.trainer.record import Record, Snapshot
from tests.helpers.reference import agree, row_gradient


def in_this_process(one: Configuration, step: str) -> None:
    STEPS[step](one)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the steps, which run in this process."""
    monkeypatch.setattr(scale, "step_in_a_process", in_this_process)
    monkeypatch.setattr(scale_configuration, "code_version", lambda *_: "now")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return tmp_path / "work"


def recorded(folder: Path, theta: Tensor, rows: int) -> Path:
    """The record of a run that saw every row but the last in one of its four steps, in two segments."""
    generator = torch.Generator().manual_seed(0)
    weights = [theta + 0.05 * torch.randn(theta.shape, generator=generator) for _ in range(2)]
    diagonals = [torch.rand(theta.shape, generator=generator) + 0.5 for _ in range(3)]
    snapshots = [Snapshot(step, *pair) for step, *pair in zip((1, 3), weights, diagonals, strict=False)]
    run = Record(4, 2, weight_decay=0.01, snapshots=snapshots, total=rows, end=Snapshot(4, theta, diagonals[2]))
    for part in torch.randperm(rows - 1, generator=generator).chunk(4):
        run.add(0.02, part, torch.rand(len(part), generator=generator, dtype=torch.float64))
    run.save(folder)
    return folder


def test_exact_scores_of_500_rows_are_gradients_times_responses(tmp_path: Path) -> None:
    """Responses go forwards through the segments; the query's gradient is plain autograd's."""
    world = registry.load_world("tiny", rows=500, queries=3)
    model, config = world.model().eval(), ResponseConfig(parameters="lora", batch_size=64)
    parameters = TrackedParameters.of(model, "lora")
    record, batches = recorded(tmp_path, parameters.read(model), 500), list(world.batches(world.queries, 1))
    context = BuildContext(model, parameters, config, world.rows, world.collate, world.rows)
    slow = torch.stack([row_gradient(model, parameters, CAUSAL_LM, batch) for batch in batches])
    gradients = truth.likelihood_gradients(model, parameters, CAUSAL_LM, batches)
    with Storage(1 << 30) as storage, frozen(model):
        passes = truth.recorded_passes(context, record, storage)
        passes.measure_curvature(200)
        scores = truth.exact_scores(passes, gradients)
        responses = passes.respond(torch.arange(500), passes.zeros(500))
    agree(scores.double(), -slow.double() @ responses.double().T, 1e-4)
    assert not scores[:, -1].any()


def test_scale_of_a_tiny_world_names_rows_and_is_resumed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        f"scale --world tiny --rows 30 --queries 4 --budgets 21 31 --timed 1 --work {work} --results {results.FOLDER}"
    )
    assert main(words.split()) == 0
    result = json.loads((results.FOLDER / "scale_tiny.json").read_text())
    (line,), (beside,) = result["rows"], result["beside"].values()
    assert line["recall, 31"] >= 0.9  # as many passes as rows
    assert line["recall, 31"] >= line["recall, 21"] > 0.5
    assert line["error, %"] < 1
    assert line["forwards, 31"] > 1
    assert line["query MiB"] >= beside["without files MiB"]["query"] > 100
    assert beside["phases"]["gradients"] > 0
    assert beside["query"]["derivatives"] > 0
    assert line["bytes / row"] > TrackedParameters.of(registry.load_world("tiny").model(), "lora").size
    monkeypatch.setattr(scale, "step_in_a_process", lambda one, step: pytest.fail(f"{step} was done again"))
    assert main(words.split()) == 0


def test_calibration_is_the_share_within_the_stated_deviations() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, -1.0]], dtype=torch.float64)
    rows = {"rows": [0, 1], "scores": [4.5, 3.0], "stds": [0.3, 0.1], "exact": [False, True]}
    found: dict[str, Any] = {
        "proponents": rows, "opponents": {"rows": [3], "scores": [-1.0], "stds": [0.0], "exact": [True]},
        "sample": {"rows": [0, 2], "scores": [5.0, 2.1], "stds": [0.6, 0.2]},
    }  # fmt: skip
    line = scale.errors(scores, [found])
    assert line["exact"] == pytest.approx(2 / 3)
    assert (line["shown within 1"], line["shown within 2"]) == (pytest.approx(2 / 3), 1.0)
    assert (line["others within 1"], line["others within 2"]) == (0.5, 1.0)
    assert line["worst tenth, %"] == pytest.approx(10.0)
    assert scale.recall(scores, [found | {"proponents": {"rows": [0, 1, 2, 3]}}], "proponents") == 1.0
    assert scale.recall(scores, [found], "proponents") == 0.5
    silent = {side: named | {"stds": None, "exact": None} for side, named in found.items()}
    assert scale.errors(scores, [silent])["shown within 1"] == "-"


class Work:
    def outer(self) -> None:
        self.inner()

    def inner(self) -> None:
        sum(range(300_000))


def test_phases_count_the_time_of_each_function_once() -> None:
    phases = Phases({"outer": f"{__name__}:Work.outer", "inner": f"{__name__}:Work.inner", "gone": "nothing:at.all"})
    with phases.measured(), PeakMemory() as memory:
        Work().outer()
    assert set(phases.seconds) == {"outer", "inner"}
    assert phases.seconds["inner"] > 10 * phases.seconds["outer"]
    assert memory.peaks["peak MiB"] >= memory.peaks["peak without files MiB"] > 10
    before = dict(phases.seconds)
    Work().outer()
    assert phases.seconds == before
