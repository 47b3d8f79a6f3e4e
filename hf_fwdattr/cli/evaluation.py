"""`hf-fwdattr evaluate`: a bank against real retraining of its own fine-tune."""

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import pipeline

from ..bank.quality import add_quality
from ..errors import QueryError
from ..evaluation.agreement import leave_sources_out, loo
from ..evaluation.designs import random_halves, random_rows, without_rows, without_sources
from ..evaluation.metrics import lds, noise_ceiling
from ..evaluation.retrain import retrain
from ..pipeline import TASK, TrainingDataAttributionPipeline
from ..trainer.reweighting import RetrainFunction, query_losses
from .commands import open_tokenizer


def evaluate_with(
    script: Path, model: str, halves: int, seeds: int, rows: int, sources: int, seed: int, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Retrain as the user's script says, compare, and write `quality` into the bank and its card; returns it.

    Args:
        script (`Path`): a Python file with `make_trainer(seed)`, a fresh Trainer with all rows, and `queries`, token
            lists with `input_ids` and `labels`; it may say `objective`.
        model (`str`): folder of the fine-tuned model with its bank.
        halves, seeds: random halves of the rows, and retrainings of each.
        rows, sources: how many are left out one at a time, in the order of the run with `seed`.
        folder (`Path`): where outcomes are kept.
    """
    said = _read(script)
    queries = [dict(query) for query in said["queries"]]
    attribute = pipeline(TASK, model=model, tokenizer=open_tokenizer(model))
    retraining = RetrainFunction(said["make_trainer"], queries, said.get("objective", "auto"))
    content = script.read_bytes() + json.dumps(queries, sort_keys=True).encode()
    settings: dict[str, Any] = {"folder": folder, "quiet": quiet, "name": hashlib.sha256(content).hexdigest()}
    measured: dict[str, Any] = {}
    if halves:
        scores, kept = attribute.scores(queries), random_halves(len(attribute.bank), halves)
        outcomes = retrain(retraining, kept, range(1, seeds + 1), description="halves", **settings)
        found = lds(scores, kept, outcomes.mean(0))
        measured["LDS"] = {
            "mean": round(found.mean, 3), "low": round(found.low, 3), "high": round(found.high, 3), "halves": halves,
            "seeds": seeds, "queries": len(queries),
        }  # fmt: skip
        if seeds > 1:
            measured["LDS"]["one_retraining"] = round(noise_ceiling(outcomes).mean, 3)
    if rows:
        measured["leave_one_out"] = _rows(attribute, retraining, rows, seed, settings)
    if sources:
        measured["sources_left_out"] = _sources(attribute, retraining, sources, seed, settings)
    add_quality(attribute.bank.folder, measured)
    return measured


def _read(script: Path) -> dict[str, Any]:
    """Names that the script defines.

    Raises:
        QueryError: it lacks one that is needed.
    """
    if not script.is_file():
        raise QueryError(f"there is no script {script}")
    said = runpy.run_path(str(script))
    for name in ("make_trainer", "queries"):
        if name not in said:
            raise QueryError(
                f"{script} does not define {name!r}: it needs make_trainer(seed), which gives a fresh Trainer with "
                "all rows, and queries, a list of {'input_ids': ..., 'labels': ...}"
            )
    return said


def _rows(
    attribute: TrainingDataAttributionPipeline,
    retraining: RetrainFunction,
    count: int,
    seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    total = len(attribute.bank)
    chosen = random_rows(total, count)
    outcomes = retrain(retraining, without_rows(total, chosen), [seed], description="rows", **settings)[0]
    found = loo(attribute.scores(retraining.queries), chosen, outcomes)
    return {"rows": len(chosen)} | found.summary() | _replay(attribute, retraining, outcomes)


def _sources(
    attribute: TrainingDataAttributionPipeline,
    retraining: RetrainFunction,
    count: int,
    seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    bank = attribute.bank
    if not bank.manifest.sources:
        raise QueryError("the bank knows no sources to leave out; make it with ResponseConfig(source_column=...)")
    owner = torch.cat([sources for _, sources, _ in bank.coordinates()]).long()
    names = len(bank.manifest.sources)
    chosen = random_rows(names, count)
    outcomes = retrain(retraining, without_sources(owner, chosen), [seed], description="sources", **settings)[0]
    found = leave_sources_out(attribute.source_scores(retraining.queries), chosen, outcomes)
    return {"sources": len(chosen)} | found.summary() | _replay(attribute, retraining, outcomes)


def _replay(
    attribute: TrainingDataAttributionPipeline, retraining: RetrainFunction, outcomes: Tensor
) -> dict[str, Any]:
    """By how much the run with all rows missed the bank's own model: large where seed or script are not the run's."""
    own = query_losses(attribute.model, retraining.queries, retraining.objective)
    return {"replay_gap_nats": round(float((outcomes[0] - own).abs().max()), 4)}
