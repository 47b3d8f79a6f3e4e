"""What a response bank costs, as ratios within one run: training with and without, a query against plain forwards.

    python scripts/cost.py [--pairs 5] [--directions 128]
    python scripts/cost.py --smollm2 [--rows 48] [--model HUB_ID_OR_FOLDER]    SmolLM2-135M with LoRA
    python scripts/cost.py --peaks [1000 20000]                    peak memory of the passes by number of rows

The first also prints the peak memory of training and of the passes for one and for four times the rows, and the bank's
bytes per row. Training is timed by the processor's clock on one thread, which other processes do not disturb.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import corpora
import lora_world
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from results import report
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    default_data_collator,
    pipeline,
    set_seed,
)

from hf_fwdattr import ResponseCallback, ResponseConfig, build_bank
from hf_fwdattr.jvp.backend import WAYS, Backend
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.trainer import build


class Clock(TrainerCallback):
    """Seconds of the training loop itself; stands before the measured callback in the list."""

    def on_train_begin(self, *_, **__):
        self.began = time.process_time()

    def on_train_end(self, *_, **__):
        self.loop = time.process_time() - self.began


def train(world, rows, callbacks, folder, **changes):
    """One fine-tune; returns (seconds of the loop, seconds in all, trainer)."""
    clock = Clock()
    trainer = Trainer(
        model=world.model(), args=lora_world.arguments(folder, seed=0, **changes), train_dataset=rows,
        data_collator=default_data_collator, callbacks=[clock, *callbacks],
    )  # fmt: skip
    began = time.process_time()
    trainer.train()
    return clock.loop, time.process_time() - began, trainer


@dataclass
class SmolLM2:
    """SmolLM2-135M with a fresh adapter on q and v: what a World offers, as far as training is concerned."""

    path: str

    def model(self):
        set_seed(0)
        base = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def ratios(world, rows, pairs: int, epochs: int, callback_of, **changes) -> tuple[list[dict], object, object]:
    """Paired runs with and without the callback: ratios of the loop, and of all of it in epochs; trainer, callback."""
    loops, passes, looks, times = [], [], [], []
    look, spent = build.gradient_predictor, [0.0]

    def timed(*given):
        began = time.process_time()
        found = look(*given)
        spent[0] = time.process_time() - began
        return found

    build.gradient_predictor = timed
    with tempfile.TemporaryDirectory() as folder:
        train(world, rows, [], folder, **changes | {"max_steps": 2})  # warm up
    folder = tempfile.mkdtemp(prefix="fwdattr-cost-")
    for _ in range(pairs):
        plain, _, _ = train(world, rows, [], folder, **changes)
        callback = callback_of()
        loop, total, trainer = train(world, rows, [callback], folder, **changes)
        loops.append(loop / plain)
        passes.append((total - loop) / (plain / epochs))
        looks.append(spent[0] / (plain / epochs))
        times.append(plain)
        print(f"loop {loops[-1]:.3f}, passes {passes[-1]:.2f} epochs, first look {looks[-1]:.2f} of them", flush=True)
    build.gradient_predictor, epoch = look, statistics.median(times) / epochs
    table = [
        {"what": "training loop with the callback, against without", "ratio": statistics.median(loops),
         "low": min(loops), "high": max(loops), "seconds": statistics.median(times)},
        {"what": "the passes and all after training, in epochs of training", "ratio": statistics.median(passes),
         "low": min(passes), "high": max(passes), "seconds": statistics.median(passes) * epoch},
        {"what": "of that, the first look", "ratio": statistics.median(looks), "low": min(looks), "high": max(looks),
         "seconds": statistics.median(looks) * epoch},
    ]  # fmt: skip
    return table, trainer, callback


def bank_callback(directions, **settings):
    return ResponseCallback(
        ResponseConfig(parameters="lora", directions=directions, source_column="source", quiet=True, **settings)
    )


def peak_of(options: list[str]) -> float:
    """Peak resident memory in MiB of this script in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory", *options], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_run(kind: str, count: int, directions: int) -> None:
    """What `peak_of` starts: train on so many rows with or without the callback, or only make their passes."""
    world = lora_world.load()
    rows = world.rows.select([i % len(world.rows) for i in range(count)])
    settings = {"sample_rows": 480, "curvature_samples": 480}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "passes":
            rows = rows.map(lambda row: {key: row[key][:16] for key in ("input_ids", "labels")})
            horizon = {"steps": 100, "step_size": 1e-4}
            config = ResponseConfig(parameters="lora", directions=directions, quiet=True, horizon=horizon, **settings)
            build_bank(world.model(), rows, config, folder=folder)
        else:
            callbacks = [] if kind == "plain" else [bank_callback(directions, segments=1, **settings)]
            train(world, rows, callbacks, folder, num_train_epochs=1)
    # Not ru_maxrss: that one survives exec and would report the parent's peak.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(int(peak.split()[1]) / 1024))


def query_ratios(attribute, world, directions: int) -> list[dict]:
    """Time of one query's readout against k + 1 plain forward passes of the same query, alternating."""
    attribute._reader._lines(slice(0, directions))  # read before anything is timed
    rows = []
    for readout in WAYS:
        ratios, seconds = [], []
        attribute._reader.engine = Backend(attribute.model, attribute._reader.parameters, readout)
        for row in world.queries.select(range(5)):
            query = {"input_ids": row["input_ids"], "labels": row["input_ids"]}
            tokens = torch.tensor([row["input_ids"]])
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
            began = time.perf_counter()
            with torch.no_grad():
                for _ in range(directions + 1):
                    CAUSAL_LM.forward(attribute.model, batch)
            plain = time.perf_counter() - began
            began = time.perf_counter()
            attribute.read(
                [query], slice(0, directions)
            )  # source directions are extra and counted where they are used
            seconds.append(time.perf_counter() - began)
            ratios.append(seconds[-1] / plain)
        rows.append(
            {
                "what": f"one query, {directions} directions, {readout}, against {directions + 1} plain forwards",
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
    parser.add_argument("--directions", type=int, default=128)
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--rows", type=int, default=48, help="of --smollm2")
    parser.add_argument("--model", help="another folder or Hub id for --smollm2")
    parser.add_argument("--peaks", nargs="*", type=int)
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory_run(options.memory[0], int(options.memory[1]), options.directions)
    elif options.peaks is not None:
        peaks(options.peaks or [1000, 20000], options.directions)
    elif options.smollm2:
        smollm2(options.model, options.pairs, options.rows)
    else:
        small_world(options.pairs, options.directions)


def peaks(counts: list[int], directions: int) -> None:
    """One segment over rows of 16 tokens, 480 of them sample rows."""
    started = time.time()
    rows = [{"rows": count, "peak of the passes, MiB": round(peak_of(["passes", str(count)]))} for count in counts]
    report("cost_peaks", "Peak memory of the passes by number of rows", rows, started)


def smollm2(model: str | None, pairs: int, count: int) -> None:
    """Rows of 64 tokens, batches of six, one epoch, one segment: 2 S + 1 = 3 epochs of passes, and the first look."""
    started = time.time()
    world = SmolLM2(model or str(corpora.smollm2(corpora.cache_folder() / "smollm2-135m")))
    tokens = torch.randint(1000, 20000, (count, 64), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    table, _, callback = ratios(
        world, rows, pairs, 1,
        lambda: ResponseCallback(ResponseConfig(directions=16, segments=1, batch_size=6, quiet=True)),
        per_device_train_batch_size=6, num_train_epochs=1,
    )  # fmt: skip
    facts = {
        "training_rows": count,
        "tokens": 64,
        "segments": 1,
        "directions": 16,
        "responding": callback.bank.manifest.size,
    }
    report("cost_smollm2", "Cost on SmolLM2-135M with LoRA", table, started, **facts)


def small_world(pairs: int, directions: int) -> None:
    """The world of lora_world.py: training, passes, queries, memory."""
    started = time.time()
    world = lora_world.load()
    table, trainer, callback = ratios(world, world.rows, pairs, 3, lambda: bank_callback(directions))
    trainer.save_model(trainer.args.output_dir)
    attribute = pipeline(
        "training-data-attribution", model=trainer.args.output_dir, tokenizer=world.tokenizer(), device="cpu"
    )
    table += query_ratios(attribute, world, directions)
    files = callback.bank.manifest.files
    per_row = sum(file.size for file in files if file.kind == "coordinates") / len(world.rows)
    memory = {
        f"{kind}, {count} rows": round(peak_of([kind, str(count)]))
        for kind in ("plain", "bank")
        for count in (480, 1920)
    }
    report(
        "cost", "Cost, as ratios", table, started,
        bank_bytes_per_row=round(per_row), probe_bytes=sum(f.size for f in files if f.kind == "directions"),
        epochs_of_training=3, peak_memory_MiB=memory,
    )  # fmt: skip


if __name__ == "__main__":
    main()
