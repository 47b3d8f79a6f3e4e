"""The same strength at any number of rows: recall, error, calibration, time, memory and bytes of a bank.

A GPT-2 of 0.9 M parameters is trained for one epoch with LoRA on so many rows of real text, with the real callback at
default settings; B matrices are tracked. Truth are exact scores of all rows: gradients of the queries by autograd in
float64, walked back through the run, times the gradients of every row. Time is the processor's on one thread. Steps
run in processes of their own and are kept in the folder `--work`: what is there is not done again, and the table shows
everything that was measured there. A million rows: `--world enwik8 --rows 1000000`, some hours, resumable.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..corpora import cache_folder
from ..curve import TOP
from ..report.results import report, result_name
from ..scale_configuration import Configuration
from ..scale_steps import STEPS


BESIDE = (  # what the result file shows beside the table
    "worst tenth, %", "exact", "ms", "first query s", "loop", "training MiB", "without files MiB", "phases", "query",
    "bytes",
)  # fmt: skip
# Kinds of shards that do not grow with rows.
FIXED = ("directions", "error_projections", "derivative_regression", "averaged_weights", "code_weights")


def run(
    world: str = "news", rows: tuple[int, ...] = (2000, 6000, 20000, 100000), bits: tuple[str, ...] = ("default",),
    queries: int = 20, budgets: tuple[int, ...] = (33, 65, 129), timed: int = 5, work: str | None = None,
    curvature: int = 0, reuse: bool = False, measure: str | None = None,
) -> None:  # fmt: skip
    started, folder = time.time(), Path(work) if work else cache_folder() / "scale"
    for count in rows:
        for width in bits:
            one = Configuration(world, count, width, queries, tuple(budgets), timed, folder, curvature, reuse)
            if measure:
                torch.set_num_threads(1)
                STEPS[measure](one)
                return
            for step in STEPS:
                if not one.done(step):
                    print(f"{world}, {count} rows, {width} bits: {step}", flush=True)
                    step_in_a_process(one, step)
            line = judged(one)
            print(line, flush=True)
            (folder / f"result-{world}-{count:09}-{width}-{curvature}.json").write_text(json.dumps(line, indent=2))
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob(f"result-{world}-*.json"))]
    lines = [{key: value for key, value in line.items() if key not in BESIDE} for line in kept]
    beside = {
        f"{line['rows']} rows, {line['bits']} bits, {line['curvature']} samples": {key: line[key] for key in BESIDE}
        for line in kept
    }
    title = f"{world}: the top {TOP} of many rows"
    report(result_name("scale", world), title, lines, started, queries=queries, beside=beside)


def step_in_a_process(one: Configuration, step: str) -> None:
    """Run a step in a process of its own, on one thread."""
    words = [sys.executable, "-m", "benchmarks", "scale", "--world", one.world_name, "--rows", str(one.rows)]
    words += ["--bits", one.bits, "--queries", str(one.queries), "--budgets", *map(str, one.budgets)]
    words += ["--timed", str(one.timed), "--work", str(one.work), "--measure", step]
    words += ["--curvature", str(one.curvature)]
    words += ["--reuse"] if one.reuse else []
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])} | os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, cwd=Path(__file__).parents[2])


def judged(one: Configuration) -> dict[str, Any]:
    """Return the line of the table from what the steps have written."""
    alone, built, asked = (one.read(step) for step in ("plain", "build", "ask"))
    scores = torch.load(one.files["truth"])["scores"].double()
    line: dict[str, Any] = {"rows": one.rows, "bits": one.bits, "curvature": built["of"][1]}
    for budget in one.budgets:
        line[f"recall, {budget}"] = recall(scores, asked[str(budget)]["queries"], "proponents")
    most = asked[str(one.budgets[-1])]
    line["of opponents"] = recall(scores, most["queries"], "opponents")
    line |= errors(scores, most["queries"])
    line |= {f"forwards, {budget}": asked[str(budget)]["forwards"] for budget in one.budgets}
    line |= {"ms": most["ms"], "first query s": asked["first query s"]}
    training = alone["row s"] * one.rows
    line["loop"], line["build"] = built["loop s"] / training, built["after s"] / training
    processes = {"training": alone, "build": built, "query": asked}
    line |= {f"{process} MiB": peaks["peak MiB"] for process, peaks in processes.items()}
    line["without files MiB"] = {process: peaks["peak without files MiB"] for process, peaks in processes.items()}
    growing = sum(size for kind, size in built["bytes"].items() if kind not in FIXED)
    line |= {"bytes / row": round(growing / one.rows), "bank MB": round(sum(built["bytes"].values()) / 1e6, 1)}
    phases = built["phases s"] | {"other": built["after s"] - sum(built["phases s"].values())}
    line["phases"] = {label: round(spent / training, 3) for label, spent in phases.items()}
    milliseconds = {label: round(spent, 1) for label, spent in asked["phases ms"].items()}
    return line | {"bytes": built["bytes"], "query": milliseconds}


def recall(scores: Tensor, found: list[dict[str, Any]], side: str) -> float:
    """Return which share of the true best (or worst) rows is named, mean over queries."""
    sign = 1.0 if side == "proponents" else -1.0
    best = (sign * scores).topk(min(TOP, scores.shape[1]), 1).indices.tolist()
    shares = [len(set(top) & set(one[side]["rows"])) / len(top) for top, one in zip(best, found, strict=True)]
    return sum(shares) / len(shares)


def errors(scores: Tensor, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the relative errors of the scores that are shown, and how well standard deviations are calibrated.

    Those of the rows that are shown, and of a sample of all rows; where the library states none, a dash stands for
    them.
    """
    sides = ("proponents", "opponents")
    shown = [(one[side], line) for one, line in zip(found, scores, strict=True) for side in sides]
    relative = torch.cat([(torch.tensor(rows["scores"]) / line[rows["rows"]] - 1).abs() for rows, line in shown])
    result: dict[str, Any] = {
        "error, %": 100 * float(relative.median()), "worst tenth, %": 100 * float(relative.quantile(0.9)),
        "exact": "-",
    }  # fmt: skip
    if all(rows["exact"] is not None for rows, _ in shown):
        result["exact"] = float(torch.cat([torch.tensor(rows["exact"]).double() for rows, _ in shown]).mean())
    sample = [(one["sample"], line) for one, line in zip(found, scores, strict=True)]
    for label, group in (("shown", shown), ("others", sample)):
        for count in (1, 2):
            result[f"{label} within {count}"] = _within(group, count)
    return result


def _within(group: list[tuple[dict[str, Any], Tensor]], count: int) -> float | str:
    """Return the share of true scores within so many stated standard deviations; a dash if none are stated."""
    if any(rows["stds"] is None for rows, _ in group):
        return "-"
    inside = [
        (torch.tensor(rows["scores"]).double() - line[rows["rows"]]).abs()
        <= count * torch.tensor(rows["stds"]).double()
        for rows, line in group
    ]
    return float(torch.cat(inside).double().mean())
