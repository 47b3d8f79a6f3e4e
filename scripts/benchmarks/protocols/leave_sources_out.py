"""Leave whole sources out, for real: predicted against measured change of the queries' losses, in nats.

The order of batches and the size of every step stay as they were; only the source's rows weigh nothing. Beside the
removal stands the exact derivative of real training: central differences of runs with the source's weight at 1.3 and
0.7. Slopes are of measured on predicted change, so that 1 is a calibrated score. --ablate repeats it without the
shrinkage of the sampled curvature and with other weights of Adam's second-moment feedback: where the defaults come
from. --baselines compares the sources' summed scores of the gradient dot product and of BM25 instead of derivatives.
"""

import time
from typing import Any
from unittest import mock

import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from hf_fwdattr.evaluation.agreement import sum_over_sources
from hf_fwdattr.response import curvature
from hf_fwdattr.trainer import optimizer

from ..methods.bank import attributed_run
from ..registry import load_world, make_method
from ..report.results import report, result_name
from ..world import World


STEP = 0.3  # of the weights of the central difference


def run(
    world: str = "lora-news", sources: int = 8, segments: int = 3, ablate: bool = False, baselines: bool = False,
    workers: int = 1, model: str | None = None,
) -> None:  # fmt: skip
    started, chosen = time.time(), load_world(world, **({"model": model} if model else {}))
    if baselines:
        compare_methods(chosen, segments, workers, started)
        return
    left_out = list(range(0, len(chosen.sources), max(1, len(chosen.sources) // sources)))[:sources]
    truth = measured(chosen, left_out, workers)
    rows = table(left_out, truth, source_scores(chosen, segments))
    name = result_name("leave_sources_out", world)
    report(
        name, f"{world}: {len(left_out)} sources left out: change of {len(chosen.queries)} queries' losses, nats",
        rows, started, medians={key: round(value, 3) for key, value in medians(rows).items()},
    )  # fmt: skip
    if ablate:
        lines = [{"variant": "as shipped", **medians(rows)}]
        for feedback, shrunk in ((0.0, False), (0.0, True), (1.0, True), (2.0, False), (3.0, True)):
            keep = curvature.ledoit_wolf if shrunk else (lambda *_: 0.0)
            with mock.patch.object(optimizer, "FEEDBACK", feedback), mock.patch.object(curvature, "ledoit_wolf", keep):
                values = medians(table(left_out, truth, source_scores(chosen, segments)))
            lines.append(
                {"variant": f"feedback {feedback:g}, {'shrunk' if shrunk else 'unshrunk'} curvature"} | values
            )
        report(f"{name}_ablation", "The same, other settings: medians over sources", lines, started)


def source_scores(world: World, segments: int, **settings: Any) -> Tensor:
    """Return exact scores (queries, sources) from the sources' responses."""
    settings = {"directions": 1, "segments": segments, "source_column": world.source_column} | settings
    with attributed_run(world, source_directions=len(world.sources), **settings) as run:
        return run.source_scores(world)


def measured(world: World, sources: list[int], workers: int) -> dict[str, Tensor]:
    """Return changes of the queries' losses (sources, queries): by removal, and as derivatives by the weight."""
    weights = [torch.ones(len(world.row_sources))]
    for source in sources:
        weights += [torch.where(world.row_sources == source, factor, 1.0) for factor in (0.0, 1.0 + STEP, 1.0 - STEP)]
    losses = world.retrain(torch.stack(weights), [world.seed], workers, "sources reweighted")[0]
    return {"removal": losses[1::3] - losses[0], "derivative": (losses[2::3] - losses[3::3]) / (2 * STEP)}


def table(sources: list[int], truth: dict[str, Tensor], scores: Tensor) -> list[dict[str, Any]]:
    """Return a line for each source: agreement over queries, and the change of the source's own query."""
    rows = []
    for number, source in enumerate(sources):
        predicted, removal = scores[:, source], truth["removal"][number]
        line = dict(zip(("cosine", "slope"), agreement(removal, predicted), strict=True))
        pair = agreement(truth["derivative"][number], -predicted)
        line |= dict(zip(("cosine, derivative", "slope, derivative"), pair, strict=True))
        if source < len(predicted):
            line |= {"own query, measured": float(removal[source]), "own query, predicted": float(predicted[source])}
        rows.append({"source": f"source {source}"} | line)
    return rows


def agreement(measured: Tensor, predicted: Tensor) -> tuple[float, float]:
    """Return the cosine, and the slope of the measured on the predicted change."""
    product = measured @ predicted
    return float(product / (measured.norm() * predicted.norm())), float(product / (predicted @ predicted))


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median over sources of each measure of agreement."""
    keys = ("cosine", "slope", "cosine, derivative", "slope, derivative")
    return {key: torch.tensor([row[key] for row in rows]).median().item() for key in keys}


def compare_methods(world: World, segments: int, workers: int, started: float) -> None:
    """Leave every source out, and compare the bank with summed scores of rows."""
    weights = torch.stack(
        [torch.ones(len(world.row_sources)), *(world.row_sources.ne(s).float() for s in range(len(world.sources)))]
    )
    losses = world.retrain(weights, [world.seed], workers, "sources left out")[0]
    retrained, change = time.time(), (losses[1:] - losses[0]).T
    predicted = {"bank, exact source scores": source_scores(world, segments, directions=16)}
    for label, name in (("gradient dot product", "gradient-dot"), ("BM25", "bm25")):
        predicted[label] = sum_over_sources(
            make_method(name).scores(world).values, world.row_sources, len(world.sources)
        )
    rows = [{"method": label} | agreement_of_pairs(scores, change) for label, scores in predicted.items()]
    report(
        result_name("leave_sources_out", world.name),
        f"{world.name}: {len(world.sources)} sources left out in turn: change of {len(change)} queries' losses",
        rows, started, training_rows=len(world.rows), retraining_s=round(retrained - started),
        measured_nats={"largest": round(float(change.max()), 3), "median": round(float(change.median()), 4)},
    )  # fmt: skip


def agreement_of_pairs(predicted: Tensor, measured: Tensor) -> dict[str, float]:
    """Compare (queries, sources) of predicted and measured changes.

    Rank correlations over all pairs, per source over queries and per query over sources (medians); slope of measured
    on predicted; and for what share of queries the source that costs most is the one with the highest score.
    """
    per_source = [spearmanr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
    per_query = [spearmanr(p, m).statistic for p, m in zip(predicted, measured, strict=True)]
    x, y = predicted.flatten(), measured.flatten()
    return {
        "Spearman, all pairs": float(spearmanr(x, y).statistic),
        "per source": float(torch.tensor(per_source).median()),
        "per query": float(torch.tensor(per_query).median()),
        "Pearson": float(pearsonr(x, y).statistic),
        "slope": float(x @ y / (x @ x)),
        "greatest loser found": float((predicted.argmax(1) == measured.argmax(1)).double().mean()),
    }
