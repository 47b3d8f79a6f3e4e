"""Leave rows and sources out of the small LoRA world, for real and in the same order: do scores say what happens?

    python scripts/lora_loo.py [--rows 48] [--sources 20] [--segments 3] [--derivative 4] [--removed 10] [--workers 2]

Random rows are left out one at a time, then those that the first three batches showed, then whole sources, and the
change of 40 queries' losses is compared with the scores, in nats. (A row that came later is a random one that was not
in the first three batches.) --derivative asks what any first-order score could reach: for so many rows of either kind,
central differences of real training in float64. --removed leaves out all at once the rows that are ranked first for so
many queries, in growing numbers, beside as many random ones: query loss difference and brittleness. Every retraining
is kept; a killed run goes on.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import corpora
import lora_world
import torch
from lds_lora import gradient_dot
from leave_sources_out import train
from results import FOLDER as FOLDER_OF_RESULTS
from results import report
from torch import Tensor
from transformers import Trainer, default_data_collator

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.evaluation.agreement import Agreement, agreement, leave_sources_out, loo
from hf_fwdattr.evaluation.designs import random_rows, without_random, without_rows, without_sources, without_top
from hf_fwdattr.evaluation.metrics import brittleness, removal
from hf_fwdattr.evaluation.retrain import retrain


FOLDER = f"leave-sources-out-{lora_world.VERSION}"  # one folder: the run with all rows is in it once


def bank_scores(world: lora_world.World, segments: int) -> tuple[Tensor, Tensor]:
    """(queries, rows) and (queries, sources) of an exact bank made while training."""
    config = ResponseConfig(
        parameters="lora",
        source_column="source",
        segments=segments,
        directions="exact",
        source_directions=len(world.sources),
    )
    with tempfile.TemporaryDirectory() as folder:
        attribute = lora_world.attributed(world, ResponseCallback(config), folder)
        queries = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in world.queries]
        order = [attribute.bank.manifest.sources.index(str(source)) for source in range(len(world.sources))]
        return attribute.scores(queries, batch_size=1).double(), attribute.source_scores(queries)[:, order].double()


def outcomes(weights: Tensor, workers: int, title: str) -> Tensor:
    """(runs, queries) losses after the fine-tune with seed 0 and these weights (runs, rows)."""
    folder = Path(corpora.cache_folder()) / FOLDER
    return retrain(train, weights, [0], folder, title, workers=workers, name=lora_world.NAME)[0]


def first_rows(world: lora_world.World, batches: int) -> Tensor:
    """(rows,) positions of the rows in the first batches of the run with seed 0, in their order."""
    numbered = world.rows.remove_columns(["source"]).add_column("row", list(range(len(world.rows))))
    with tempfile.TemporaryDirectory() as folder:
        arguments = lora_world.arguments(folder, seed=0, remove_unused_columns=False)
        trainer = Trainer(
            model=world.model(), args=arguments, train_dataset=numbered, data_collator=default_data_collator
        )
        return torch.cat([batch["row"] for batch in itertools.islice(trainer.get_train_dataloader(), batches)])


def in_double(weights: Tensor, seed: int) -> Tensor:
    """[`leave_sources_out.train`] in float64."""
    world = lora_world.load()
    model = lora_world.fine_tune(world, world.rows, seed, weights.double().tolist(), torch.float64)
    return lora_world.query_losses(model, world.queries)


def derivatives(rows: Tensor, total: int, step: float, workers: int) -> tuple[Tensor, Tensor]:
    """(queries, rows): change of losses without each row, and minus its derivative by a central difference."""
    lines = [torch.ones(total, dtype=torch.float64)]
    for row in rows.tolist():
        for weight in (0.0, 1.0 + step, 1.0 - step):
            lines.append(torch.ones(total, dtype=torch.float64).index_fill(0, torch.tensor(row), weight))
    folder = Path(corpora.cache_folder()) / FOLDER
    losses = retrain(
        in_double, torch.stack(lines), [0], folder, f"steps of {step:g}", workers=workers,
        name=f"{lora_world.NAME}-float64",
    )[0]  # fmt: skip
    return (losses[1::3] - losses[0]).T, -((losses[2::3] - losses[3::3]) / (2 * step)).T


def ceiling(groups: dict[str, Tensor], scores: Tensor, workers: int) -> list[dict]:
    """How well derivatives of real training, and scores, tell what leaving out each group's rows does."""
    lines = []
    for name, rows in groups.items():
        for step in (0.1, 0.01):
            gone, exact = derivatives(rows, scores.shape[1], step, workers)
            lines.append({"rows": name, "foretold by": f"derivative, weights {1 - step:g} and {1 + step:g}",
                          **agreement(exact, gone).summary()})  # fmt: skip
        lines.append({"rows": name, "foretold by": "scores", **agreement(scores[:, rows], gone).summary()})
    return lines


def line(what: str, found: Agreement) -> dict:
    """One line of the table."""
    return {"left out": what, "n": found.predicted.shape[1], **found.summary()}


def removals(world: lora_world.World, methods: dict[str, Tensor], queries: int, workers: int) -> list[dict]:
    """Without the rows ranked first for each of the first few queries: rise of its loss, and is its gain lost?

    A query counts as lost when its loss has come back at least half-way to where it was before the fine-tune.
    """
    total = len(world.rows)
    before = lora_world.query_losses(world.model().eval(), world.queries)[:queries]
    counts = torch.tensor([round(share * total) for share in (0.01, 0.05, 0.1, 0.2)])
    lines, lost = [], {}
    for method, scores in methods.items():
        kept_answers = []
        for count in counts.tolist():
            random = without_random(total, count, 4).float()
            weights = torch.cat([torch.ones(1, total), without_top(scores[:queries], count).float(), random])
            losses = outcomes(weights, workers, f"without {count} rows")[:, :queries]
            base, own = losses[0], losses[1 : queries + 1]
            found = removal(own, losses[queries + 1 :], base)
            kept_answers.append(own.diagonal() < (base + before) / 2)
            lines.append(
                {"method": method, "rows left out": count, "share": count / total, "rise": found.top.mean,
                 "low": found.top.low, "high": found.top.high, "random rows": found.random.mean}
            )  # fmt: skip
        lost[method] = brittleness(torch.stack(kept_answers), counts)
    for number, row in enumerate(lines):
        row["half of the gain lost"] = float(lost[row["method"]].lost[number % len(counts)])
    return lines


def picture(panels: dict[str, Agreement]) -> None:
    """Predicted against measured change of every pair of query and what was left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4))
    for axis, (name, found) in zip(axes, panels.items(), strict=True):
        axis.plot(found.predicted.flatten(), found.measured.flatten(), ".", markersize=2, alpha=0.5)
        ends = torch.tensor([found.predicted.min(), found.predicted.max()])
        axis.plot(ends, ends, "-", color="grey", lw=0.8)
        axis.plot(ends, found.slope * ends, "--", color="black", lw=0.8)
        axis.set_title(f"{name}: Pearson {found.pearson:.2f}, slope {found.slope:.2f}", fontsize=8)
        axis.set_xlabel("predicted rise of the loss, nats", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("measured rise, nats", fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER_OF_RESULTS / "lora_loo.png", dpi=80)
    pyplot.close(figure)
    print("wrote lora_loo.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--sources", type=int, default=20)
    parser.add_argument("--derivative", type=int, default=0, help="rows of either kind, derived in float64")
    parser.add_argument("--removed", type=int, default=0, help="queries whose first rows are left out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--segments", type=int, nargs="+", default=[3])
    options = parser.parse_args()
    started = time.time()
    world = lora_world.load()
    owner = torch.tensor(world.rows["source"])
    rows, first = random_rows(len(owner), options.rows), first_rows(world, 3)
    sources = torch.arange(0, len(world.sources), max(1, len(world.sources) // options.sources))[: options.sources]
    without_row = outcomes(without_rows(len(owner), rows), options.workers, "rows left out")
    without_first = outcomes(without_rows(len(owner), first), options.workers, "first rows left out")
    without_source = outcomes(without_sources(owner, sources), options.workers, "sources left out")
    later = ~torch.isin(rows, first)
    at_later = torch.cat([torch.tensor([True]), later])
    banks = {count: bank_scores(world, count) for count in options.segments}
    table, panels = [], {}
    for count, (by_row, by_source) in banks.items():
        panels = {
            "a row": loo(by_row, rows, without_row),
            "a row that came later": loo(by_row, rows[later], without_row[at_later]),
            "a row of the first three batches": loo(by_row, first, without_first),
            "a source": leave_sources_out(by_source, sources, without_source),
        }
        table += [line(f"{name}, {count} segments", found) for name, found in panels.items()]
        if count == options.segments[0]:
            picture(panels)
    report("lora_loo", "Left out for real, in the same order: exact banks of the LoRA world", table, started)
    scores = banks[options.segments[0]][0]
    if options.derivative:
        groups = {"any": rows[: options.derivative], "of the first batch": first[: options.derivative]}
        lines = ceiling(groups, scores, options.workers)
        report("lora_derivative", "Rows left out in float64: what derivatives and scores foretell", lines, started)
    if options.removed:
        queries = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in world.queries]
        methods = {"bank, exact": scores, "gradient dot product": gradient_dot(world, queries).double()}
        lines = removals(world, methods, options.removed, options.workers)
        report(
            "lora_removal", f"Without the rows ranked first for a query, {options.removed} queries, nats", lines,
            started, queries=options.removed,
        )  # fmt: skip


if __name__ == "__main__":
    main()
