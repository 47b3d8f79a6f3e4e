"""Leave rows and sources out of the small LoRA world, for real and in the same order: do scores say what happens?

    python scripts/lora_loo.py [--rows 48] [--sources 20] [--segments 3 1 5] [--removed 10] [--workers 2]

Rows are left out one at a time, then whole sources, and the change of 40 queries' losses is compared with the scores,
in nats. With --removed, the rows that are ranked first for so many queries are left out all at once, 1 % and 5 % of
them, beside as many random ones (query loss difference). Every retraining is kept; a killed run goes on.
"""

import argparse
import tempfile
import time
from pathlib import Path

import corpora
import lora_world
import torch
from leave_sources_out import train
from results import report
from torch import Tensor
from transformers import Trainer, default_data_collator, pipeline

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.evaluation.agreement import Agreement
from hf_fwdattr.evaluation.loo import loo, without_rows
from hf_fwdattr.evaluation.removal import removal, without_random, without_top
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.evaluation.sources import leave_sources_out, without_sources


FOLDER = f"leave-sources-out-{lora_world.VERSION}"  # one folder: the run with all rows is in it once


def bank_scores(world: lora_world.World, segments: int) -> tuple[Tensor, Tensor]:
    """(queries, rows) and (queries, sources) of an exact bank made while training."""
    config = ResponseConfig(
        parameters="lora", source_column="source", segments=segments, probes="exact", source_probes=len(world.sources)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=world.model(), args=lora_world.arguments(folder, seed=0), train_dataset=world.rows,
            data_collator=default_data_collator, callbacks=[ResponseCallback(config)],
        )  # fmt: skip
        trainer.train()
        trainer.save_model(folder)
        attribute = pipeline("training-data-attribution", model=folder, tokenizer=world.tokenizer(), device="cpu")
        queries = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in world.queries]
        order = [attribute.bank.manifest.sources.index(str(source)) for source in range(len(world.sources))]
        return attribute.scores(queries, batch_size=1).double(), attribute.source_scores(queries)[:, order].double()


def outcomes(weights: Tensor, workers: int, title: str) -> Tensor:
    """(runs, queries) losses after the fine-tune with seed 0 and these weights (runs, rows)."""
    folder = Path(corpora.cache_folder()) / FOLDER
    return retrain(train, weights, [0], folder, title, workers=workers, name=lora_world.NAME)[0]


def line(what: str, found: Agreement) -> dict:
    """One line of the table."""
    return {"left out": what, "n": found.predicted.shape[1], **found.summary()}


def removals(scores: Tensor, count: int, queries: int, workers: int) -> dict:
    """Query loss difference without the first `count` rows, for the first few queries."""
    rows = scores.shape[1]
    kept = torch.cat(
        [torch.ones(1, rows), without_top(scores[:queries], count).float(), without_random(rows, count, 4).float()]
    )
    losses = outcomes(kept, workers, f"without {count} rows")[:, :queries]
    found = removal(losses[1 : queries + 1], losses[queries + 1 :], losses[0])
    return {
        "rows": count, "of": rows, "queries": queries, "top": found.top.mean, "low": found.top.low,
        "high": found.top.high, "random": found.random.mean,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("--removed", type=int, default=0, help="queries whose first rows are left out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--segments", type=int, nargs="+", default=[3])
    parser.add_argument("--truth-only", action="store_true")
    options = parser.parse_args()
    started = time.time()
    world = lora_world.load()
    owner = torch.tensor(world.rows["source"])
    rows = torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))[: options.rows]
    sources = torch.arange(0, len(world.sources), max(1, len(world.sources) // options.sources))[: options.sources]
    banks = {} if options.truth_only else {count: bank_scores(world, count) for count in options.segments}
    without_row = outcomes(without_rows(len(owner), rows), options.workers, "rows left out")
    without_source = outcomes(without_sources(owner, sources), options.workers, "sources left out")
    if options.truth_only:
        return
    table = []
    for count, (by_row, by_source) in banks.items():
        table.append(line(f"a row, {count} segment(s)", loo(by_row, rows, without_row)))
        table.append(line(f"a source, {count} segment(s)", leave_sources_out(by_source, sources, without_source)))
    report("lora_loo", "Left out for real, in the same order: exact banks of the LoRA world", table, started)
    if options.removed:
        scores = banks[options.segments[0]][0]
        sizes = [round(share * len(owner)) for share in (0.01, 0.05)]
        lines = [removals(scores, size, options.removed, options.workers) for size in sizes]
        report("lora_removal", "Rise of a query's loss without the rows ranked first for it, nats", lines, started)


if __name__ == "__main__":
    main()
