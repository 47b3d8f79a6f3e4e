"""Ignored gradient clipping: scores of sources against the derivative of real training.

The tiny world of tests/test_sources_removed.py: eight sources of four rows, six epochs. Each source's weight is nudged
to 1.2 and 0.8 in real runs of the same batches, and the change of 16 queries' losses per unit of weight is compared
with the scores, once with every step's clipping counted as a smaller rate and once as if nothing had been clipped.
Medians over the sources. A norm of 0 clips nothing. About ten minutes on one core.
"""

import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset

from hf_fwdattr import build_bank
from hf_fwdattr.trainer.reweighting import apply_row_weights, query_losses
from tests.helpers.cases import adapted, padded
from tests.helpers.runs import ask, base, config, fine_tune, trainer_for
from tests.test_sources_removed import EACH, QUERIES, SOURCES, _dialects

from ..report.results import report
from .leave_sources_out import agreement


NUDGE = 0.2
RATES = {"sgd": 0.1, "adamw_torch": 2e-3}


def run(optimizers: tuple[str, ...] = ("sgd", "adamw_torch"), norms: tuple[float, ...] = (0.0, 1.0, 0.3)) -> None:
    started, rows = time.time(), []
    for optimizer in optimizers:
        for norm in norms:
            with tempfile.TemporaryDirectory() as folder:
                rows.append({"optimizer": optimizer, "max_grad_norm": norm} | compared(optimizer, norm, Path(folder)))
            print(rows[-1], flush=True)
    report("clipping", "Ignored and counted clipping against the derivative of real training", rows, started)


def compared(optimizer: str, norm: float, folder: Path) -> dict[str, float]:
    """Return cosine and slope of measured on predicted changes, with clipping and without."""
    rows = _dialects(SOURCES * EACH, seed=1)
    asked = [{k: row[k] for k in ("input_ids", "labels")} for row in _dialects(QUERIES, seed=2)]
    changes = dict(optim=optimizer, learning_rate=RATES[optimizer], num_train_epochs=6, max_grad_norm=norm)
    settings, data, model = config(parameters="lora", directions=1), Dataset.from_list(rows), adapted(base())
    callback = fine_tune(folder, model, settings, data, **changes)
    record, banks = callback.recorder.record, {"counted": callback.bank}
    clips, record.clips = record.clips, [1.0] * len(record.clips)
    record.save(folder / "record")
    banks["ignored"] = build_bank(model, data, settings, data_collator=padded, record=folder / "record")
    predicted = {name: -ask(model, bank).source_scores(asked).double() for name, bank in banks.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in banks}
    for source in range(SOURCES):
        ends = []
        for sign in (1, -1):
            weights = torch.tensor([1.0 + sign * NUDGE * (row["source"] == str(source)) for row in rows])
            trainer = apply_row_weights(trainer_for(folder, adapted(base()), data, None, **changes), weights)
            trainer.train()
            ends.append(query_losses(trainer.model, asked))
        for name, scores in predicted.items():
            found[name].append(agreement((ends[0] - ends[1]) / (2 * NUDGE), scores[:, source]))
    medians = {name: torch.tensor(pairs).median(0).values.tolist() for name, pairs in found.items()}
    return {"mean factor": sum(clips) / len(clips)} | {
        f"{measure}, {name}": pair[at]
        for name, pair in medians.items()
        for at, measure in enumerate(("cosine", "slope"))
    }
