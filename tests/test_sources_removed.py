"""Sources really removed, in the same order of batches: does what was predicted happen? Small leave_sources_out.py."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lora_world import WeightedTrainer
from torch import Tensor

from tests.helpers.cases import adapted, padded
from tests.helpers.runs import arguments, ask, base, config, fine_tune


SOURCES, EACH, QUERIES = 8, 4, 16


def _dialects(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts in which each source has two words of its own, between words that all of them use."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        source = index % SOURCES
        common = torch.randint(1, 7, (12,), generator=generator)
        own = 7 + 2 * source + torch.randint(0, 2, (12,), generator=generator)
        words = torch.where(torch.rand(12, generator=generator) < 0.5, own, common).clamp(max=22).tolist()
        rows.append({"input_ids": words, "labels": words, "source": str(source)})
    return rows


def _padded(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    weights = torch.tensor([feature.pop("weight") for feature in features], dtype=torch.float64)
    return {**padded(features), "weight": weights}


def _losses(folder: Path, rows: list[dict[str, Any]], weights: list[float], asked: list[dict[str, Any]]) -> Tensor:
    """Losses of the queries (queries,) after the same training with weighted rows."""
    dataset = Dataset.from_list(
        [{"input_ids": r["input_ids"], "labels": r["labels"], "weight": w} for r, w in zip(rows, weights, strict=True)]
    )
    model = adapted(base())
    settings = arguments(folder, remove_unused_columns=False, learning_rate=2e-3, num_train_epochs=6)
    WeightedTrainer(model=model, args=settings, train_dataset=dataset, data_collator=_padded).train()
    model.eval()
    batch = padded(asked)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)


def test_removed_sources_change_outputs_as_predicted(tmp_path: Path) -> None:
    rows = _dialects(SOURCES * EACH, seed=1)
    asked = [{k: row[k] for k in ("input_ids", "labels")} for row in _dialects(QUERIES, seed=2)]
    model = adapted(base())
    settings = config(parameters="lora", directions=1)
    callback = fine_tune(tmp_path, model, settings, Dataset.from_list(rows), learning_rate=2e-3, num_train_epochs=6)
    predicted = ask(model, callback.bank).source_scores(asked).double()
    full = _losses(tmp_path, rows, [1.0] * len(rows), asked)
    cosines, slopes = [], []
    for source in range(SOURCES):
        kept = [float(row["source"] != str(source)) for row in rows]
        real, said = _losses(tmp_path, rows, kept, asked) - full, predicted[:, source]
        cosines.append(float(real @ said / (real.norm() * said.norm())))
        slopes.append(float(real @ said / (said @ said)))
    assert torch.tensor(cosines).median() > 0.9, cosines
    assert 0.6 < torch.tensor(slopes).median() < 1.4, slopes
