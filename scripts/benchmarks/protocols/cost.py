"""Cost of a response bank, as ratios within one run: training with and without, a query against plain forwards.

Training is timed by the processor's clock on one thread, which other processes do not disturb. --memory adds the peak
memory of training alone and with a bank, for one and for four times the rows, each in a process of its own; --peaks
measures the peak of the passes alone by number of rows of 16 tokens. --loop 101 times, in so many steps, what the
callback does before the first step and in the loop, without the passes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_fwdattr import ResponseCallback, ResponseConfig, build_bank
from hf_fwdattr.evaluation.cost import Cost, cost
from hf_fwdattr.jvp.backend import READOUT_OPTIONS
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.scorer import Scorer

from ..loop_share import loop_shares
from ..meters import Phases
from ..methods.bank import attributed_run
from ..registry import load_world
from ..report.results import report, result_name
from ..world import World


PHASES = {
    "curvature": "hf_fwdattr.response.passes:Passes.measure_curvature",
    "responses": "hf_fwdattr.response.passes:Passes.respond",
    "gradients at the end": "hf_fwdattr.response.passes:Passes.read_gradients",
    "gradient predictor": "hf_fwdattr.trainer.fit_predictor:PredictorFit.__call__",
    "directions": "hf_fwdattr.response.assembly:factorize",
    "coordinates and codes": "hf_fwdattr.response.assembly:_RowStream.respond",
    "hashes, texts and files": "hf_fwdattr.trainer.build:bank_contents",
}
SAMPLES = {"sample_rows": 480, "curvature_samples": 480}  # the same whatever the number of rows


def run(
    world: str = "lora-news", pairs: int = 3, directions: int = 128, segments: int = 3, parameters: str = "lora",
    rows: int = 0, epochs: int = 3, memory: bool = False, peaks: tuple[int, ...] = (), measure: tuple[str, ...] = (),
    loop: int = 0, capture: str = "auto",
) -> None:  # fmt: skip
    """Time the training and the queries of a world, or the training of so many rows, its own again and again."""
    started, chosen = time.time(), load_world(world)
    if measure:
        _measured_process(chosen, measure[0], int(measure[1]), directions)
        return
    if peaks:
        lines = [{"rows": n, "peak of the passes, MiB": round(peak_of(world, "passes", n))} for n in peaks]
        report("cost_peaks", "Peak memory of the passes by number of rows", lines, started)
        return
    settings: dict[str, Any] = {
        "parameters": parameters, "directions": directions, "segments": segments, "capture": capture
    }  # fmt: skip
    if loop:
        table = loop_shares(chosen, loop, pairs, {"source_column": chosen.source_column} | settings)
        report(result_name("cost_loop", world), f"{world}: time before the first step and in the loop", table, started)
        return
    facts: dict[str, Any] = {"training_rows": rows or len(chosen.rows), "epochs_of_training": epochs} | settings
    if rows:
        chosen.rows = chosen.rows.select([index % len(chosen.rows) for index in range(rows)])
    else:
        settings["source_column"] = chosen.source_column
    table = training_ratios(chosen, pairs, epochs, settings)
    if not rows:
        table += query_ratios(chosen, directions, settings, facts)
    if memory:
        counts = (len(chosen.rows), 4 * len(chosen.rows))
        peaks_of = {f"{kind}, {n} rows": round(peak_of(world, kind, n)) for kind in ("plain", "bank") for n in counts}
        facts["peak_memory_MiB"] = peaks_of
    report(
        result_name(f"cost_{rows}_rows" if rows else "cost", world),
        f"{world}: cost, as ratios",
        table,
        started,
        **facts,
    )


class Clock(TrainerCallback):
    """Times the training loop itself; it stands before the measured callback in the list."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.loop = time.process_time() - self._began


def train(world: World, callbacks: list[TrainerCallback], **changes: Any) -> tuple[float, float]:
    """Fine-tune once; return the processor's seconds of the loop, and of everything."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = world.trainer(folder, [clock, *callbacks], **changes)
        began = time.process_time()
        trainer.train()
        return clock.loop, time.process_time() - began


def training_ratios(world: World, pairs: int, epochs: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ratios of paired runs with and without the callback, against the training alone: whole, and by phase."""
    train(world, [], max_steps=2)  # warm up
    found: list[tuple[float, ...]] = []  # all, loop, passes in shares of the training; seconds of the training
    spent: dict[str, list[float]] = {}
    for _ in range(pairs):
        phases = Phases(PHASES)
        plain, _ = train(world, [], num_train_epochs=epochs)
        callback = ResponseCallback(ResponseConfig(quiet=True, **(world.bank | settings)))
        with phases.measured():
            loop, total = train(world, [callback], num_train_epochs=epochs)
        found.append((total / plain, loop / plain, (total - loop) / plain, plain))
        for label, seconds in phases.seconds.items():
            spent.setdefault(label, []).append(seconds / plain)
        print("training and bank {:.2f}, loop {:.3f}, passes {:.2f}; {:.1f} s".format(*found[-1]), flush=True)
    totals, loops, passes, seconds = zip(*found, strict=True)
    training = statistics.median(seconds)
    lines = {
        "training and bank, against the training": totals,
        "training loop with the callback": loops,
        "the passes and all after training": passes,
    }
    lines |= {f"of that, {label}": values for label, values in spent.items()}
    return [_line(label, values, statistics.median(values) * training) for label, values in lines.items()]


def query_ratios(world: World, directions: int, settings: dict[str, Any], facts: dict[str, Any]) -> list[dict]:
    """Return the time of one query's derivatives against k + 1 plain forward passes, for each way of taking them."""
    table = []
    with attributed_run(world, **settings) as run:

        def ratio(scorer: Scorer, query: dict[str, Any]) -> Cost:
            @torch.no_grad()
            def plain() -> None:
                for _ in range(directions + 1):
                    CAUSAL_LM.forward(run.model, scorer.batch([query]))

            return cost(lambda: scorer.directional_derivatives([query], slice(0, directions)), plain, 1)

        for readout in READOUT_OPTIONS:
            scorer = Scorer(run.bank, run.model, readout)
            costs = [ratio(scorer, query) for query in world.token_lists()[:5]]
            label = f"one query, {directions} directions, {readout}, against {directions + 1} plain forwards"
            seconds = statistics.median(found.seconds for found in costs)
            table.append(_line(label, [found.ratio for found in costs], seconds))
        manifest = run.bank.manifest
        facts["bank_bytes_per_row"] = round(run.bytes_per_row("coordinates"))
        facts["direction_bytes"] = sum(file.size for file in manifest.files if file.kind == "directions")
        facts["tracked_parameters"] = manifest.size
    return table


def _line(label: str, ratios: Any, seconds: float) -> dict[str, Any]:
    middle = statistics.median(ratios)
    return {"what": label, "ratio": middle, "low": min(ratios), "high": max(ratios), "seconds": seconds}


def peak_of(world: str, kind: str, rows: int) -> float:
    """Return the peak resident memory, in MiB, of a process of its own."""
    words = [sys.executable, "-m", "benchmarks", "cost", "--world", world, "--measure", kind, str(rows)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measured_process(world: World, kind: str, count: int, directions: int) -> None:
    """Train on so many rows with or without the callback, or only make their passes; print the peak memory."""
    rows = world.rows.select([index % len(world.rows) for index in range(count)])
    settings = world.bank | SAMPLES | {"directions": directions, "quiet": True}
    if kind == "passes":
        rows = rows.map(lambda row: {key: row[key][:16] for key in ("input_ids", "labels")})
        config = ResponseConfig(horizon={"steps": 100, "step_size": 1e-4}, **settings)
        with tempfile.TemporaryDirectory() as folder:
            build_bank(world.model(), rows, config, folder=folder)
    else:
        world.rows = rows
        bank = ResponseConfig(segments=1, source_column=world.source_column, **settings)
        train(world, [] if kind == "plain" else [ResponseCallback(bank)], num_train_epochs=1)
    # Not ru_maxrss: that one survives exec and would report the parent's peak.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(int(peak.split()[1]) / 1024))
