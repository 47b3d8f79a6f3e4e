"""Source scores against retraining without the source, in the same order of batches."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_fwdattr.trainer.reweighting import apply_row_weights, query_losses
from tests.helpers.cases import adapted
from tests.helpers.runs import ask, base, config, fine_tune, trainer_for


SOURCES, EACH, QUERIES = 8, 4, 16
TRAINING: dict[str, Any] = dict(learning_rate=4e-3, num_train_epochs=6, per_device_train_batch_size=8)


def _dialects(count: int, seed: int) -> list[dict[str, Any]]:
    """Return texts in which each source has two words of its own, between words that all sources use."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        source = index % SOURCES
        common = torch.randint(1, 7, (12,), generator=generator)
        own = 7 + 2 * source + torch.randint(0, 2, (12,), generator=generator)
        words = torch.where(torch.rand(12, generator=generator) < 0.5, own, common).clamp(max=22).tolist()
        rows.append({"input_ids": words, "labels": words, "source": str(source)})
    return rows


def _losses(folder: Path, rows: Dataset, weights: Tensor, asked: list[dict[str, Any]]) -> Tensor:
    """Return the losses of the queries (queries,) after the same training with weighted rows."""
    model = adapted(base())
    apply_row_weights(trainer_for(folder, model, rows, None, **TRAINING), weights).train()
    return query_losses(model, asked)


def test_removed_sources_change_losses_as_predicted(tmp_path: Path) -> None:
    rows = Dataset.from_list(_dialects(SOURCES * EACH, seed=1))
    asked = [{k: row[k] for k in ("input_ids", "labels")} for row in _dialects(QUERIES, seed=2)]
    model = adapted(base())
    callback = fine_tune(tmp_path, model, config(parameters="lora", directions=1), rows, **TRAINING)
    predicted = ask(model, callback.bank).source_scores(asked).double()
    full = _losses(tmp_path, rows, torch.ones(len(rows)), asked)
    cosines, slopes = [], []
    for source in range(SOURCES):
        kept = torch.tensor([float(name != str(source)) for name in rows["source"]])
        change, score = _losses(tmp_path, rows, kept, asked) - full, predicted[:, source]
        cosines.append(float(change @ score / (change.norm() * score.norm())))
        slopes.append(float(change @ score / (score @ score)))
    assert torch.tensor(cosines).median() > 0.9, cosines
    assert 0.6 < torch.tensor(slopes).median() < 1.4, slopes
