"""Leave rows and sources out one at a time, for real and in the same order of batches: do scores say what happens?

Random rows are left out, then those that the first three batches showed, then whole sources, and the change of the
queries' losses is compared with the scores of an exact bank, in nats. (A row that came later is a random one that was
not in the first three batches.) Every retraining is kept; a killed run goes on.
"""

import itertools
import tempfile
import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, default_data_collator

from hf_fwdattr.evaluation.agreement import agreement, loo
from hf_fwdattr.evaluation.designs import (
    random_rows,
    without_random,
    without_rows,
    without_sources,
    without_top,
)
from hf_fwdattr.evaluation.metrics import brittleness, removal

from ..methods.bank import attributed_run
from ..registry import load_world, make_method
from ..report.pictures import calibration
from ..report.results import report, result_name
from ..world import World


SHARES = (0.01, 0.05, 0.1, 0.2)
METHODS = {"bank, exact": ("bank", {"directions": "exact"}), "gradient dot product": ("gradient-dot", {})}


def run(
    world: str = "lora-news", rows: int = 48, sources: int = 20, segments: tuple[int, ...] = (3,), workers: int = 2
) -> None:
    """Compare the scores of exact banks, one for each number of segments, with what happens."""
    started, chosen = time.time(), load_world(world)
    total, count = len(chosen.rows), len(chosen.sources)
    left_out, first = random_rows(total, rows), first_rows(chosen, 3)
    some = torch.arange(0, count, max(1, count // sources))[:sources]

    def retrain(weights: Tensor, title: str) -> Tensor:
        return chosen.retrain(weights, [chosen.seed], workers, title)[0]

    without_row = retrain(without_rows(total, left_out), "rows left out")
    without_first = retrain(without_rows(total, first), "first rows left out")
    without_source = retrain(without_sources(chosen.row_sources, some), "sources left out")
    later = ~torch.isin(left_out, first)
    with_base, table = torch.cat([torch.tensor([True]), later]), list[dict[str, Any]]()
    for number in segments:
        by_row, by_source = exact_scores(chosen, number)
        panels = {
            "a row": loo(by_row, left_out, without_row),
            "a row that came later": loo(by_row, left_out[later], without_row[with_base]),
            "a row of the first three batches": loo(by_row, first, without_first),
            "a source": loo(by_source, some, without_source),
        }
        for label, found in panels.items():
            head = {"left out": f"{label}, {number} segments", "n": found.predicted.shape[1]}
            table.append(head | found.summary())
        if number == segments[0]:
            calibration(panels, result_name("leave_one_out", world))
    title = f"{world}: left out for real, in the same order of batches; exact banks"
    report(result_name("leave_one_out", world), title, table, started)


def exact_scores(world: World, segments: int) -> tuple[Tensor, Tensor]:
    """Return scores (queries, rows) and (queries, sources) of an exact bank."""
    settings = {"directions": "exact", "segments": segments, "source_directions": len(world.sources)}
    with attributed_run(world, source_column=world.source_column, **settings) as run:
        return run.scorer().scores(world.token_lists(), batch_size=1).double(), run.source_scores(world)


def first_rows(world: World, batches: int) -> Tensor:
    """Return the positions of the rows in the first batches of the attributed run, in their order."""
    columns = [name for name in ("input_ids", "labels") if name in world.rows.column_names]
    numbered = world.rows.select_columns(columns).add_column("row", list(range(len(world.rows))))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=world.model(), args=world.arguments(folder, remove_unused_columns=False), train_dataset=numbered,
            data_collator=default_data_collator,
        )  # fmt: skip
        return torch.cat([batch["row"] for batch in itertools.islice(trainer.get_train_dataloader(), batches)])


def run_derivative(world: str = "lora-news", rows: int = 2, segments: int = 3, workers: int = 2) -> None:
    """Rows left out in float64, predicted by derivatives of real training and by scores.

    The derivatives, central differences by the row's weight, are what any first-order score could reach. They are
    taken for a few random rows and for a few rows of the first batch.
    """
    started, chosen = time.time(), load_world(world)
    scores, table = exact_scores(chosen, segments)[0], list[dict[str, Any]]()
    groups = {"any": random_rows(len(chosen.rows), rows), "of the first batch": first_rows(chosen, 1)[:rows]}
    for group, left_out in groups.items():
        for step in (0.1, 0.01):
            gone, exact = derivatives(chosen, left_out, step, workers)
            label = f"derivative, weights {1 - step:g} and {1 + step:g}"
            table.append({"rows": group, "predicted by": label, **agreement(exact, gone).summary()})
        table.append({"rows": group, "predicted by": "scores", **agreement(scores[:, left_out], gone).summary()})
    title = f"{world}: rows left out in float64, predicted by derivatives and by scores"
    report(result_name("derivative", world), title, table, started)


def derivatives(world: World, rows: Tensor, step: float, workers: int) -> tuple[Tensor, Tensor]:
    """Return (queries, rows): change of losses without each row, and minus its derivative by a central difference."""
    lines = [torch.ones(len(world.rows), dtype=torch.float64)]
    for row in rows.tolist():
        for weight in (0.0, 1.0 + step, 1.0 - step):
            lines.append(torch.ones_like(lines[0]).index_fill(0, torch.tensor(row), weight))
    losses = world.retrain(torch.stack(lines), [world.seed], workers, f"steps of {step:g}", double=True)[0]
    return (losses[1::3] - losses[0]).T, -((losses[2::3] - losses[3::3]) / (2 * step)).T


def run_removal(world: str = "lora-news", queries: int = 5, workers: int = 2) -> None:
    """The rows ranked first for a query left out all at once, in growing numbers, beside as many random ones.

    Measured: the rise of the query's loss, and for what share of queries half of what the fine-tune gained is lost.
    """
    started, chosen = time.time(), load_world(world)
    scores = {label: make_method(name, **settings).scores(chosen) for label, (name, settings) in METHODS.items()}
    rows = removals(chosen, {label: found.values.double() for label, found in scores.items()}, queries, workers)
    title = f"{world}: without the rows ranked first for a query, {queries} queries, nats"
    report(result_name("removal", world), title, rows, started, queries=queries)


def removals(world: World, methods: dict[str, Tensor], queries: int, workers: int) -> list[dict[str, Any]]:
    """Return a line for each method and number of rows.

    A query counts as lost when its loss has come back at least half-way to where it was before the fine-tune.
    """
    total = len(world.rows)
    before = world.losses(world.model().eval())[:queries]
    counts = torch.tensor([max(1, round(share * total)) for share in SHARES])
    lines: list[dict[str, Any]] = []
    for method, scores in methods.items():
        kept = []
        for count in counts.tolist():
            random = without_random(total, count, 4).float()
            weights = torch.cat([torch.ones(1, total), without_top(scores[:queries], count).float(), random])
            losses = world.retrain(weights, [world.seed], workers, f"without {count} rows")[0][:, :queries]
            base, own = losses[0], losses[1 : queries + 1]
            found = removal(own, losses[queries + 1 :], base)
            kept.append(own.diagonal() < (base + before) / 2)
            lines.append(
                {"method": method, "rows left out": count, "share": count / total, "rise": found.top.mean,
                 "low": found.top.low, "high": found.top.high, "random rows": found.random.mean}
            )  # fmt: skip
        lost = brittleness(torch.stack(kept), counts).lost
        for line, share in zip(lines[-len(counts) :], lost.tolist(), strict=True):
            line["half of the gain lost"] = share
    return lines
