"""Run as several processes by torchrun: fine-tunes under named settings; rank 0 writes the results.

    torchrun --nproc_per_node 2 -m tests.helpers.ranks <folder> <name> [<name> ...]

Writes <folder>/<name>.pt with the bank's scores of a few queries, the trained weights, and two laws' residuals. The
global batch is of four rows whatever the number of processes, so that training is the same.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from hf_fwdattr import ResponseCallback, build_bank
from hf_fwdattr.errors import AttributionError, UnsupportedError
from hf_fwdattr.models.fsdp import is_sharded
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.response.distributed import Ranks
from hf_fwdattr.trainer.callback import RECORD
from tests.helpers.cases import adapted, padded
from tests.helpers.runs import ask, base, config, queries, trainer_for, training_set, weights


ROWS, BATCH = 24, 4


def world_size() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_last_rank() -> bool:
    """Return whether this is the last process of the run."""
    return int(os.environ.get("RANK", "0")) == world_size() - 1


def wide(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded to the model's context."""
    return padded(rows, 16)


# Names of runs that continue in one folder.
RUNS = {"saved": "run", "resumed": "run", "sharded, saved": "sharded run", "sharded, resumed": "sharded run"}
RUNS |= {"killed": "killed", "killed again": "killed", "revived": "killed"}
SHARDED: dict[str, Any] = dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]})
# Changes of the plain run. `rows`, `collate`, `settings` (of the bank), `groups`, `adapter`, `unreadable`, `pieces`,
# `resume` (the step) and `kill` (the step, the ranks) are read here; everything else goes to TrainingArguments.
# A run that is resumed when it has ended, or rebuilt from its record alone, has no captured gradients any more.
AFTER: dict[str, Any] = dict(settings=dict(capture="after"))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, after": AFTER,
    "accumulated": dict(gradient_accumulation_steps=2),
    "padded to the context": dict(collate=wide),
    "two workers": dict(dataloader_num_workers=2),
    "dispatched": dict(collate=wide, accelerator_config={"dispatch_batches": True}),
    "last batch dropped": dict(rows=26, dataloader_drop_last=True),
    "wrapped around": dict(rows=26) | AFTER,
    "stopped in an epoch": dict(max_steps=8),
    "warmup and cosine": dict(lr_scheduler_type="cosine", warmup_steps=4),
    "parameter groups": dict(groups=True),
    "clipped": dict(max_grad_norm=0.05),
    "SGD": dict(optim="sgd"),
    "smoothed labels": dict(label_smoothing_factor=0.1),
    "grouped by length": dict(train_sampling_strategy="group_by_length"),
    "activations checkpointed": dict(gradient_checkpointing=True),
    "evaluated": dict(eval_strategy="steps", eval_steps=3),
    "tokens not averaged": dict(average_tokens_across_devices=False),
    "float32": dict(dtype=torch.float32),
    "bf16 autocast": dict(dtype=torch.float32, bf16=True),
    "compiled, eager": dict(torch_compile=True, torch_compile_backend="eager"),
    "compiled, inductor": dict(torch_compile=True),
    "stream": dict(stream=True, settings=dict(row_id_column="number"), max_steps=18, collate=wide),
    "best model loaded": dict(
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        learning_rate=0.3,
    ),
    "directions": dict(settings=dict(directions=8)),
    "streamed": dict(settings=dict(directions=8, sample_rows=10)),
    "on disk": dict(settings=dict(directions=8, sample_rows=10, memory_budget=0)),
    "failing": dict(settings=dict(objective=None)),
    "refused by one": dict(settings=dict(objective=None)),
    "saved": dict(save_strategy="steps", save_steps=5) | AFTER,
    "resumed": dict(save_strategy="steps", save_steps=5, resume=5) | AFTER,
    "killed": dict(save_strategy="steps", save_steps=5, kill=(8, (0, 1))),
    "killed again": dict(save_strategy="steps", save_steps=5, resume=5, kill=(13, (1,))),
    "revived": dict(save_strategy="steps", save_steps=5, resume=10),
    "sharded": SHARDED,
    "sharded, after": SHARDED | AFTER,
    "sharded, all weights": SHARDED | dict(adapter=False, settings=dict(parameters="linear")),
    "sharded, streamed": SHARDED
    | dict(settings=dict(directions=8, sample_rows=9, gradient_predictor=False)),  # a sharded model has none
    "sharded in one group, evaluated": dict(
        fsdp=True, fsdp_config={"version": 2, "auto_wrap_policy": "NO_WRAP"}, eval_strategy="steps", eval_steps=3
    ),
    "sharded, accumulated": SHARDED | dict(gradient_accumulation_steps=2),
    "sharded, clipped": SHARDED | dict(max_grad_norm=0.05),
    "sharded, float32": SHARDED | dict(dtype=torch.float32),
    "loaded in pieces": dict(pieces=True),
    "sharded, bf16": SHARDED | dict(dtype=torch.float32, bf16=True),
    "sharded, failing": SHARDED | dict(unreadable=True),
    "sharded, saved": SHARDED | dict(save_strategy="steps", save_steps=5) | AFTER,
    "sharded, resumed": SHARDED | dict(save_strategy="steps", save_steps=5, resume=5) | AFTER,
    "sharded, everything": SHARDED | dict(settings=dict(parameters="trainable"), adapter=False),
}


def has_ended(callback: ResponseCallback) -> bool:
    """Return whether the callback's training has ended and its passes have begun."""
    return callback._recorder is not None and callback._recorder.record.end is not None


class Failing:
    """An objective that the last rank cannot compute, in the passes or (`early`) before the first step already."""

    def __init__(self, early: bool):
        self.early, self.callback = early, ResponseCallback()

    def __call__(self, model: Any, batch: Any) -> Any:
        if is_last_rank() and (self.early or has_ended(self.callback)):
            raise ValueError("this row's gradient")
        return CAUSAL_LM.forward(model, batch)


class Unreadable:
    """A collator that fails on the last rank when the passes have begun."""

    def __init__(self, callback: ResponseCallback):
        self.callback, self.calls = callback, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if has_ended(self.callback) and is_last_rank():
            self.calls += 1
            if self.calls > 4:
                raise ValueError("these rows")
        return padded(rows)


class Killed(TrainerCallback):
    """kill -9 of some ranks once a step has its gradients, while others may wait for this rank."""

    def __init__(self, step: int, ranks: tuple[int, ...]):
        self.step, self.ranks = step, ranks

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and int(os.environ.get("RANK", "0")) in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


def whole_model(model: Any, name: str) -> Any:
    """Return an unsharded copy of a sharded model; every rank calls it."""
    settings = SETTINGS[name]
    if not is_sharded(model):
        return model
    fresh = base(settings.get("dtype", torch.float64))
    fresh = adapted(fresh) if settings.get("adapter", True) else fresh
    TrackedParameters.of(fresh, "trainable").write(
        fresh, TrackedParameters.of(model, "trainable", sharded=True).read(model)
    )
    return fresh


def fine_tuned(folder: Path, name: str) -> tuple[Any, ResponseCallback]:
    """(model, callback) after training under the settings of this name."""
    how = dict(SETTINGS[name])
    world = world_size()
    if world == 1 and how.pop("fsdp", False):  # one process cannot shard
        how.pop("fsdp_config")
    changes, rows = how.pop("settings", {}), how.pop("rows", ROWS)
    objective = Failing(early=name == "refused by one")
    settings = config(**changes | (dict(objective=objective) if "objective" in changes else {}))
    groups, resume, kill = how.pop("groups", False), how.pop("resume", None), how.pop("kill", None)
    share = BATCH // world // how.get("gradient_accumulation_steps", 1)
    how = dict(per_device_train_batch_size=max(share, 1), collate=padded) | how
    model, data, callback = base(how.pop("dtype", torch.float64)), training_set(rows), ResponseCallback(settings)
    if how.pop("pieces", False) and world > 1:  # transformers shards by FSDP2 at loading
        base_folder = folder / f"base-{os.environ['RANK']}"  # save_pretrained writes on rank 0 only
        model.config.save_pretrained(base_folder)
        torch.save(model.state_dict(), base_folder / "pytorch_model.bin")
        model = type(model).from_pretrained(
            base_folder, dtype=model.dtype, distributed_config=DistributedConfig(fsdp_size=world)
        )
    objective.callback = callback
    model = adapted(model) if how.pop("adapter", True) else model
    if how.pop("unreadable", False):
        how["collate"] = Unreadable(callback)
    if groups:
        parts = [
            [p for n, p in model.named_parameters() if p.requires_grad and ("h.0" in n) == last] for last in (0, 1)
        ]
        optimizer = torch.optim.AdamW([{"params": parts[0], "lr": 1e-2}, {"params": parts[1], "lr": 3e-3}])
        how["optimizers"] = (optimizer, None)
    if how.pop("stream", False):
        data = data.to_iterable_dataset()
    if "eval_strategy" in how:
        how["eval_dataset"] = training_set(5)
    trainer = trainer_for(folder, model, data, callback, **how)
    if kill is not None:
        trainer.add_callback(Killed(*kill))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return whole_model(trainer.model, name), callback


def unit_weights(callback: ResponseCallback) -> float:
    """Return the largest deviation from one of the summed weights of a step's tokens, as this Trainer counts them."""
    tokens = torch.tensor(
        [sum(label != -100 for label in labels) for labels in callback.recorder.original["labels"]]
    ).double()
    record = callback.recorder.record
    return max(abs(float(w @ tokens[r]) - 1.0) for r, w in zip(record.rows, record.weights, strict=True))


def finished(folder: Path, model: Any, callback: ResponseCallback) -> dict[str, Any]:
    """Return scores of the bank that one process builds from a failed run's record, and the live model's error."""
    data, settings = callback.recorder.original, config()
    bank = build_bank(model, data, settings, data_collator=padded, record=folder / f"_{RECORD}")
    try:
        bank.check_model(callback.recorder.model)
        message = ""
    except UnsupportedError as error:
        message = str(error)
    return {"scores": ask(model, bank).scores(queries()), "live": message}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        began = time.perf_counter()
        where, result = folder / RUNS.get(name, name), folder / f"{name}-{world_size()}.pt"
        try:
            model, callback = fine_tuned(where, name)
        except AttributionError as error:
            everyone = Ranks.of_run()
            errors = everyone.objects(str(error))
            if everyone.rank == 0:
                torch.save({"errors": errors}, result)
            continue
        record = callback.recorder.record
        if name.endswith("failing"):
            errors = callback.recorder.ranks.objects(str(callback._bank))
            if callback.recorder.ranks.rank == 0:
                torch.save({"errors": sorted(errors)} | finished(where, model, callback), result)
            continue
        bank = callback.bank
        if callback.recorder.ranks.rank:
            continue
        rebuilt = bank
        if "FWDATTR_REBUILD" in os.environ or name in ("wrapped around", "sharded, after"):
            record.save(where / RECORD)
            rebuilt = build_bank(
                model, callback.recorder.original, callback.config, data_collator=padded, record=where / RECORD
            )
        attribute = ask(model, bank)
        scores = attribute.scores(queries())
        results = {
            "scores": scores,
            "rebuilt": scores if rebuilt is bank else ask(model, rebuilt).scores(queries()),
            "sources": attribute.source_scores(queries()),
            "weights": weights(model),
            "unit": unit_weights(callback),
            "clips": record.clips,
            "sharded": is_sharded(callback.recorder.model),
            "visits": sum(len(rows) for rows in record.rows),
            "rows": [sorted(rows.tolist()) for rows in record.rows],
        }
        torch.save(results, result)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:] or list(SETTINGS))
