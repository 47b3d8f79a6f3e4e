"""Other libraries on the world of `lds --world lora-news`: the exchange folder, our own scores, and the table.

--write makes the exchange folder of the world, with five fine-tunes for the methods that average over models, and the
scores of this library and of plain baselines. The peers write theirs, each in an environment of its own
(peers/all does everything in turn). Without --write all of them are judged against the retrainings of `lds`.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, default_data_collator

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds
from hf_fwdattr.models.parameters import TrackedParameters

from ..corpora import cache_folder
from ..methods.baselines import gradients
from ..peers.exchange import Exchange, Result, hand_in, seconds
from ..peers.table import chosen, judged, line
from ..registry import load_world, make_method
from ..report import pictures
from ..report.results import report
from ..world import World


FIGURES = ("LDS", "low", "high", "build s", "s / query", "bytes / row")
OURS = {  # file -> (method, setting, as shipped, name and settings here)
    "bank-128": ("response bank", "128 directions", True, "bank", {"directions": 128}),
    "bank-exact": ("response bank", "exact, 480 directions", False, "bank", {"directions": "exact"}),
    "bank-exact-mean": (
        "response bank, trajectory average", "exact", False, "bank", {"directions": "exact", "averaging": "trajectory"}
    ),
    "bank-two-stages": ("two stages", "128 forward passes", True, "two-stages", {}),
    "bank-first-look": (
        "coarse scores and linear combinations", "128 forward passes", True, "two-stages", {"whole": True}
    ),
}  # fmt: skip


def run(folder: Path | None = None, write: bool = False, halves: int = 64, seeds: int = 3, workers: int = 2) -> None:
    started, world = time.time(), load_world("lora-news")
    folder = folder or cache_folder() / "peers-lora"
    if write:
        write_scores(write_exchange(folder, world), world)
        return
    exchange, subsets = Exchange(folder), random_halves(len(world.rows), halves)
    outcomes = world.retrain(subsets, range(1, seeds + 1), workers)
    records = judged(exchange, lambda scores: judge(scores, subsets, outcomes))
    rows = [line(record, FIGURES) for record in chosen(records)]
    keys = ("peer", "method", "models", "setting", "shipped", "LDS", "LDS one retraining", "error")
    report(
        "peers", f"LDS on the small LoRA world, {halves} halves x {seeds}", rows, started,
        settings="a peer's setting that is not as shipped is the best of those tried, on this truth",
        tried=[{key: record.get(key) for key in keys} for record in records],
    )  # fmt: skip
    pictures.peers({"rows": rows}, "peers")


def judge(scores: Tensor, subsets: Tensor, outcomes: Tensor) -> dict[str, float]:
    """Return LDS against the mean of the retrainings, with its interval, and against one of them."""
    found = lds(scores, subsets, outcomes.mean(0))
    one = lds(scores, subsets, outcomes[0]).mean
    return {"LDS": found.mean, "low": found.low, "high": found.high, "LDS one retraining": one}


def write_scores(exchange: Exchange, world: World) -> None:
    """Write the scores of the baselines and of this library."""
    torch.set_num_threads(1)
    hand_in(exchange, "gradient-dot", lambda: gradient_dot(exchange), peer="baseline", method="gradient dot product",
            setting="end of training", shipped=True, backward="query")  # fmt: skip
    hand_in(exchange, "bm25", lambda: scored(world, "bm25"), peer="baseline", method="BM25", setting="defaults",
            shipped=True, backward="none")  # fmt: skip
    for file, (method, setting, shipped, name, settings) in OURS.items():
        hand_in(exchange, file, lambda name=name, settings=settings: scored(world, name, **settings),
                peer="hf_fwdattr", method=method, setting=setting, shipped=shipped, backward="none")  # fmt: skip


def scored(world: World, name: str, **settings: Any) -> Result:
    """Return what a method of this package makes of the world."""
    scores = make_method(name, **settings).scores(world)
    cost = scores.cost
    return Result(scores.values.float(), cost["build s"], cost["s / query"] * len(scores.values),
                  cost.get("bytes / row", 0.0))  # fmt: skip


def gradient_dot(exchange: Exchange) -> Result:
    """Score by gradient dot products at the end of training, over the LoRA matrices."""
    model = exchange.model()

    def of(tokens: Tensor, labels: Tensor) -> Tensor:
        parts = zip(tokens.split(16), labels.split(16), strict=True)
        return gradients(model, ({"input_ids": part, "labels": own} for part, own in parts))

    began = seconds()
    stored = of(exchange.rows, exchange.row_labels)
    built = seconds()
    scores = of(exchange.queries, exchange.query_labels) @ stored.T
    return Result(scores, built - began, seconds() - built, 4.0 * stored.shape[1])


def write_exchange(folder: Path, world: World, models: int = 5) -> Exchange:
    """Write the exchange folder, once."""
    if not (folder / "run.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        GPT2LMHeadModel.from_pretrained(world.folder).save_pretrained(folder / "base")
        world.tokenizer().save_pretrained(folder / "base")
        queries = torch.tensor([row["input_ids"] for row in world.queries])
        save_file({"rows": torch.tensor(world.rows["input_ids"]), "queries": queries}, folder / "tokens.safetensors")
        for seed in range(1, models):
            with tempfile.TemporaryDirectory() as scratch:
                trainer = world.trainer(scratch, seed=seed)
                trainer.train()
            _save(trainer.model, folder, seed)
        model, recorded = _recorded(world)
        _save(model, folder, 0)
        save_file(recorded, folder / "run.safetensors")
    return Exchange(folder)


def _save(model: Any, folder: Path, number: int) -> None:
    # peft would call the base model by its place in the cache; in the exchange it is beside the adapter.
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    model.save_pretrained(folder / "adapters" / str(number))


class Trajectory(TrainerCallback):
    """Records theta before each step, and its learning rate."""

    def __init__(self, parameters: TrackedParameters):
        self.parameters, self.theta, self.rates = parameters, list[Tensor](), list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any):
        self.theta.append(self.parameters.read(model))
        self.rates.append(optimizer.param_groups[0]["lr"])


def _recorded(world: World) -> tuple[Any, dict[str, Tensor]]:
    """Return the model of the attributed run, and theta, rows and rate of each step."""
    model, batches = world.model(), list[list[int]]()

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batches.append([feature.pop("row") for feature in features])
        return default_data_collator(features)

    rows = world.rows.remove_columns(["source"]).add_column("row", list(range(len(world.rows))))
    callback = Trajectory(TrackedParameters.of(model, "lora"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = world.arguments(scratch, remove_unused_columns=False)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[callback])
        trainer.train()
    recorded = {"theta": torch.stack(callback.theta), "rows": torch.tensor(batches[: len(callback.theta)])}
    return model.eval(), recorded | {"rates": torch.tensor(callback.rates)}
