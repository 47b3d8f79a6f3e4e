"""What a response bank costs, as ratios within one run: training with and without, a query against plain forwards.

    python scripts/cost.py [--pairs 5] [--probes 128]

Also the peak memory of training and of the passes for one and for four times the rows, and the bank's bytes per row.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lora_world
import torch
from datasets import concatenate_datasets
from results import report
from transformers import Trainer, TrainerCallback, default_data_collator, pipeline

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.objective import CAUSAL_LM


class Clock(TrainerCallback):
    """Seconds of the training loop itself; stands before the measured callback in the list."""

    def on_train_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_train_end(self, *_, **__):
        self.loop = time.perf_counter() - self.began


def train(world, rows, callbacks, folder):
    """One fine-tune; returns (seconds of the loop, seconds in all, trainer)."""
    clock = Clock()
    trainer = Trainer(
        model=world.model(), args=lora_world.arguments(folder, seed=0), train_dataset=rows,
        data_collator=default_data_collator, callbacks=[clock, *callbacks],
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    return clock.loop, time.perf_counter() - began, trainer


def bank_callback(probes, **settings):
    return ResponseCallback(
        ResponseConfig(parameters="lora", probes=probes, source_column="source", quiet=True, **settings)
    )


def peak_of(options: list[str]) -> float:
    """Peak resident memory in MiB of this script in a process of its own, which only trains."""
    done = subprocess.run([sys.executable, __file__, "--memory", *options], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_run(kind: str, copies: int, probes: int) -> None:
    """What `peak_of` starts: train on the rows repeated `copies` times, with or without the callback."""
    world = lora_world.load()
    rows = concatenate_datasets([world.rows] * copies)
    settings = {"sample_rows": 480, "curvature_samples": 480, "segments": 1}
    callbacks = [] if kind == "plain" else [bank_callback(probes, **settings)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=world.model(), args=lora_world.arguments(folder, seed=0, num_train_epochs=1), train_dataset=rows,
            data_collator=default_data_collator, callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
    # Not ru_maxrss: that one survives exec and would report the parent's peak.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(int(peak.split()[1]) / 1024))


def query_ratios(attribute, world, probes: int) -> list[dict]:
    """Time of one query's readout against k + 1 plain forward passes of the same query, alternating."""
    attribute._probes(slice(0, probes))  # read before anything is timed
    rows = []
    for readout in ("jvp", "difference"):
        ratios, seconds = [], []
        if readout == "difference":
            from hf_fwdattr.readout import difference

            attribute._read = difference.read
        for row in world.queries.select(range(5)):
            query = {"input_ids": row["input_ids"], "labels": row["input_ids"]}
            tokens = torch.tensor([row["input_ids"]])
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
            began = time.perf_counter()
            with torch.no_grad():
                for _ in range(probes + 1):
                    CAUSAL_LM.forward(attribute.model, batch)
            plain = time.perf_counter() - began
            began = time.perf_counter()
            attribute.read([query], slice(0, probes))  # source probes are extra and counted where they are used
            seconds.append(time.perf_counter() - began)
            ratios.append(seconds[-1] / plain)
        rows.append(
            {
                "what": f"one query, {probes} probes, {readout}, against {probes + 1} plain forwards",
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "seconds": statistics.median(seconds),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--probes", type=int, default=128)
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "COPIES"))
    options = parser.parse_args()
    if options.memory:
        memory_run(options.memory[0], int(options.memory[1]), options.probes)
        return
    started = time.time()
    world = lora_world.load()
    loops, totals, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        train(world, world.rows, [], folder)  # warm up
        for _ in range(options.pairs):
            plain, plain_total, _ = train(world, world.rows, [], folder)
            callback = bank_callback(options.probes)
            loop, total, trainer = train(world, world.rows, [callback], folder)
            loops.append(loop / plain)
            totals.append(total / plain_total)
            seconds.append(total - loop)
        trainer.save_model(folder)
        attribute = pipeline("training-data-attribution", model=folder, tokenizer=world.tokenizer(), device="cpu")
        rows = [
            {"what": "training loop with the callback, against without", "ratio": statistics.median(loops),
             "low": min(loops), "high": max(loops), "seconds": plain},
            {"what": "training and passes, against training without", "ratio": statistics.median(totals),
             "low": min(totals), "high": max(totals), "seconds": statistics.median(seconds)},
            *query_ratios(attribute, world, options.probes),
        ]  # fmt: skip
    files = callback.bank.manifest.files
    per_row = sum(file.size for file in files if file.kind == "coordinates") / len(world.rows)
    memory = {
        f"{kind}, {copies * 480} rows": round(peak_of([kind, str(copies)]))
        for kind in ("plain", "bank")
        for copies in (1, 4)
    }
    report(
        "cost", "Cost, as ratios", rows, started,
        bank_bytes_per_row=round(per_row), probe_bytes=sum(f.size for f in files if f.kind == "probes"),
        epochs_of_training=3, peak_memory_MiB=memory,
    )  # fmt: skip


if __name__ == "__main__":
    main()
