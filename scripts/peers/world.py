"""Writes the exchange folder of the small LoRA world, and the scores of what this library and plain baselines do.

    python scripts/peers/world.py FOLDER

Rows, queries and fine-tune are those of scripts/lds_lora.py. Four more fine-tunes with other seeds are for the methods
that average over models.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from exchange import Exchange, Result, hand_in, seconds
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[1]))

import lora_world
from lds_lora import bm25
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, default_data_collator

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import Parameters
from hf_fwdattr.query.scorer import BUDGET


class Trajectory(TrainerCallback):
    """Notes theta before each step, the rows that it saw and its learning rate."""

    def __init__(self, parameters: Parameters, seen: list[list[int]]):
        self.parameters, self.seen = parameters, seen
        self.theta: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.theta.append(self.parameters.read(model))
        self.rates.append(optimizer.param_groups[0]["lr"])


def write(folder: Path, world: lora_world.World, models: int = 5) -> Exchange:
    """The exchange folder, made once."""
    if not (folder / "run.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        GPT2LMHeadModel.from_pretrained(world.folder).save_pretrained(folder / "base")
        world.tokenizer().save_pretrained(folder / "base")
        tokens = {"rows": torch.tensor(world.rows["input_ids"]), "queries": torch.tensor(world.queries["input_ids"])}
        save_file(tokens, folder / "tokens.safetensors")
        for seed in range(1, models):
            _save(lora_world.fine_tune(world, world.rows, seed), folder, seed)
        model, run = _recorded(world)
        _save(model, folder, 0)
        save_file(run, folder / "run.safetensors")
    return Exchange(folder)


def _save(model, folder: Path, number: int) -> None:
    # peft would call the base model by its place in the cache; in the exchange it is beside the adapter.
    model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    model.save_pretrained(folder / "adapters" / str(number))


def _recorded(world: lora_world.World):
    """The fine-tune with seed 0, and its steps."""
    model, seen = world.model(), []

    def collate(features):
        seen.append([feature.pop("row") for feature in features])
        return default_data_collator(features)

    rows = world.rows.remove_columns(["source"]).add_column("row", list(range(len(world.rows))))
    callback = Trajectory(Parameters.of(model, "lora"), seen)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model, args=lora_world.arguments(scratch, seed=0, remove_unused_columns=False), train_dataset=rows,
            data_collator=collate, callbacks=[callback],
        )  # fmt: skip
        trainer.train()
    run = {
        "theta": torch.stack(callback.theta),
        "rows": torch.tensor(seen[: len(callback.theta)]),
        "rates": torch.tensor(callback.rates),
    }
    return model.eval(), run


def bank(world: lora_world.World, exchange: Exchange, directions: int | str, averaging: str = "none") -> Result:
    """This library: the real callback and the real pipeline."""
    callback = ResponseCallback(
        ResponseConfig(parameters="lora", directions=directions, averaging=averaging, quiet=True)
    )
    spent = _timed(callback, "on_train_end")  # everything that is not training belongs to the bank
    with tempfile.TemporaryDirectory() as folder:
        attribute = lora_world.attributed(world, callback, folder)
        queries = [{"input_ids": ids, "labels": ids} for ids in exchange.queries.tolist()]
        began = seconds()
        scores = attribute.scores(queries)
        asked = seconds() - began
        kept = sum(file.size for file in attribute.bank.manifest.files if file.kind == "coordinates")
    return Result(scores, spent[0], asked, kept / len(world.rows))


def staged(world: lora_world.World, exchange: Exchange, budget: int, rows: bool) -> Result:
    """This library within so many forward passes: in two stages, as rows are named, or whole matrices, from directions."""
    callback = ResponseCallback(ResponseConfig(parameters="lora", quiet=True))
    spent = _timed(callback, "on_train_end")
    with tempfile.TemporaryDirectory() as folder:
        attribute = lora_world.attributed(world, callback, folder)
        queries = [{"input_ids": ids, "labels": ids} for ids in exchange.queries.tolist()]
        began = seconds()
        if rows:
            scores = torch.stack([attribute._reader.rank(query, 10, budget)[1] for query in queries])
        else:
            scores = attribute.scores(queries, budget=budget)
        asked = seconds() - began
        kept = sum(f.size for f in attribute.bank.manifest.files if f.kind in ("coordinates", "responses", "kernel"))
    return Result(scores, spent[0], asked, kept / len(world.rows))


def _timed(owner, name: str) -> list[float]:
    """The seconds that a method of an object takes when it is called, in a list that fills then."""
    spent, method = [], getattr(owner, name)

    def measured(*args, **kwargs):
        began = seconds()
        try:
            return method(*args, **kwargs)
        finally:
            spent.append(seconds() - began)

    setattr(owner, name, measured)
    return spent


def gradient_dot(exchange: Exchange) -> Result:
    """Gradient dot product at the end of training, over the LoRA matrices."""
    model = exchange.model()
    parameters = Parameters.of(model, "lora")
    with frozen(model):
        gradients = PerSampleGradients(model, parameters, CAUSAL_LM)

        def of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            parts = zip(tokens.split(16), labels.split(16), strict=True)
            return torch.cat([gradients({"input_ids": part, "labels": own})[0] for part, own in parts])

        began = seconds()
        stored = of(exchange.rows, exchange.row_labels)
        built = seconds()
        scores = of(exchange.queries, exchange.query_labels) @ stored.T
    return Result(scores, built - began, seconds() - built, 4.0 * parameters.size)


def word_match(world: lora_world.World) -> Result:
    """BM25; its index is built with the first query here, and both are over in a moment."""
    began = seconds()
    scores = bm25(world, list(world.queries))
    return Result(scores.float(), 0.0, seconds() - began, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = lora_world.load()
    exchange = write(options.folder, world)
    hand_in(exchange, "gradient-dot", lambda: gradient_dot(exchange), peer="baseline", method="gradient dot product",
            setting="end of training", shipped=True, backward="query")  # fmt: skip
    hand_in(exchange, "bm25", lambda: word_match(world), peer="baseline", method="BM25", setting="defaults",
            shipped=True, backward="none")  # fmt: skip
    ours = dict(peer="hf_fwdattr", backward="none")
    for directions in (128, "exact"):
        setting = "exact, 480 directions" if directions == "exact" else f"{directions} directions"
        hand_in(
            exchange, f"bank-{directions}", lambda directions=directions: bank(world, exchange, directions), method="response bank",
            setting=setting, shipped=directions == 128, **ours,
        )  # fmt: skip
    hand_in(exchange, "bank-exact-mean", lambda: bank(world, exchange, "exact", "trajectory"), method="bank of means",
            setting="exact, averaging='trajectory'", **ours)  # fmt: skip
    for method, name, rows in (
        ("two stages", "bank-two-stages", True), ("first look and sums", "bank-first-look", False)
    ):  # fmt: skip
        hand_in(
            exchange, name, lambda rows=rows: staged(world, exchange, BUDGET, rows), method=method,
            setting=f"{BUDGET} forward passes", shipped=True, **ours,
        )  # fmt: skip


if __name__ == "__main__":
    main()
