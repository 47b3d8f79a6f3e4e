"""Accuracy against forward passes: everything that a query can be read with, against exact scores.

The top ten are the ten rows with the highest exact scores (gradients by reverse mode times the rows' responses): how
often all of them are found, and what share of them is. What the library does is measured as it does it. --lds adds LDS
against the retrainings of `lds`. Time is the processor's, in plain float32 forward passes of the same query. What did
not make it into the library (directions alone, rows without coarse scores, clusters, upper layers) is computed from
the same exact scores.
"""

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from hf_fwdattr.evaluation.cost import cost
from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds as lds_of
from hf_fwdattr.jvp.analytic import AnalyticJVP
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.query.row_codes import HeldRowCodes
from hf_fwdattr.query.scorer import Scorer

from ..curve import TOP, Curve, shared_top
from ..methods.bank import AttributedRun, attributed_run, kept_run
from ..methods.baselines import gradients
from ..registry import load_world
from ..report.pictures import budget_curve
from ..report.results import report, result_name


def run(
    world: str = "lora-news", budgets: tuple[int, ...] = (5, 9, 17, 33, 41, 65, 97, 129), directions: int = 256,
    lds: bool = False, real: int = 129, timed: int = 3, depths: tuple[int, ...] = (1, 2), keep: bool = False,
    workers: int = 2, model: str | None = None,
) -> None:  # fmt: skip
    """Draw the curve of a language model's world."""
    started, chosen = time.time(), load_world(world, **({"model": model} if model else {}))
    judge = None
    if lds:
        halves = random_halves(len(chosen.rows), chosen.halves)
        truth = chosen.retrain(halves, range(1, chosen.seeds + 1), workers).mean(0)
        judge = lambda scores: lds_of(scores, halves, truth).mean  # noqa: E731
    with ExitStack() as stack:
        settings = {"directions": directions, "source_column": chosen.source_column}
        made = kept_run(chosen, **settings) if keep else stack.enter_context(attributed_run(chosen, **settings))
        reading = Reading(made, chosen.token_lists())
        curve, facts = Curve(reading.exact, judge), checked(reading, real)
        curve.add("exact (all row responses)", len(chosen.rows) + 1, reading.exact)
        in_use(curve, reading, budgets, reading.times(budgets, timed))
        not_in_use(curve, reading, budgets)
        by_depth(curve, reading, depths)
        manifest = made.bank.manifest
    rows, name = curve.sorted(), result_name("budget_curve", world)
    budget_curve({"rows": rows}, name)
    report(
        name, f"{world}: accuracy against forward passes, the top {TOP} of {len(chosen.rows)} rows", rows, started,
        queries=len(chosen.queries), predictor_explained_variance=round(manifest.predictor_explained_variance, 4),
        explained_variance=round(manifest.explained_variance, 4), cosine_by_layer=reading.cosines(),
        bytes_per_row=round(made.bytes_per_row("row_codes")), **facts,
    )  # fmt: skip


class Reading:
    """A bank's scorer, and what reverse mode says: gradients (queries, P) and exact scores (queries, rows)."""

    def __init__(self, run: AttributedRun, queries: list[dict[str, Any]]):
        self.run, self.queries, self.scorer = run, queries, run.scorer()
        self.parameters, self.batch = self.scorer.parameters, self.scorer.batch(queries[:1])
        names = [f"^{re.escape(name)}$" for name in self.parameters.names]
        batches = (self.scorer.batch(queries[start : start + 8]) for start in range(0, len(queries), 8))
        self.gradients = -gradients(run.model, batches, names).float()
        self.responses = HeldRowCodes(run.bank).rows(torch.arange(run.bank.manifest.row_codes))
        self.exact = (self.gradients @ self.responses.T).double()
        self.coarse = torch.cat([self.scorer.scores([query], budget=1).double() for query in queries])
        self.layers = [int(re.search(r"\.(?:layers|h)\.(\d+)\.", name)[1]) for name in self.parameters.names]

    @torch.no_grad()
    def plain(self) -> None:
        """Pass the first query through the model once."""
        CAUSAL_LM.forward(self.run.model, self.batch)

    def times(self, budgets: tuple[int, ...], count: int) -> dict[tuple[str, int], list[float]]:
        """Return times of reading, in plain forward passes: in full and in half precision.

        Keys are a budget after `whole` (coarse scores and linear combinations) or `rows` (two stages).
        """
        scorers = [Scorer(self.run.bank, self.run.model, precision=precision) for precision in ("full", "half")]
        found: dict[tuple[str, int], list[float]] = {}

        def time_of(read: Callable[[dict[str, Any]], object]) -> float:
            ratios = [cost(lambda q=q: read(q), self.plain, 1, time.process_time).ratio for q in self.queries[:count]]
            return sum(ratios) / len(ratios)

        for budget in (1, *budgets) if count else ():
            found["whole", budget] = [time_of(lambda q, s=s, b=budget: s.scores([q], budget=b)) for s in scorers]
            found["rows", budget] = [time_of(lambda q, s=s, b=budget: s.rank(q, TOP, b)) for s in scorers]
        return found

    def cosines(self) -> dict[int, float]:
        """Return, by layer, the cosine of predicted and exact gradients over all queries."""
        predicted = torch.cat([self.scorer.predicted_gradients([query]) for query in self.queries])
        sums: dict[int, Tensor] = {}
        parts = (matrix.split(self.parameters.sizes, 1) for matrix in (predicted.double(), self.gradients.double()))
        for layer, one, other in zip(self.layers, *parts, strict=True):
            own = torch.stack([(one * other).sum(), one.square().sum(), other.square().sum()])
            sums[layer] = sums.get(layer, 0) + own
        return {layer: round(float(dot / (one * other).sqrt()), 2) for layer, (dot, one, other) in sums.items()}


def in_use(curve: Curve, reading: Reading, budgets: tuple[int, ...], times: dict) -> None:
    """Add what the library does."""
    scorer, queries = reading.scorer, reading.queries
    curve.add("coarse scores", 1, reading.coarse, *times.get(("whole", 1), ()))
    for budget in budgets:
        scores = torch.cat([scorer.scores([query], budget=budget).double() for query in queries])
        curve.add("coarse scores, then directions", budget, scores, *times.get(("whole", budget), ()))
    for read in [*(budget for budget in budgets if budget > 2 * TOP), "adaptive"]:
        rankings = [scorer.rank(query, TOP, read) for query in queries]
        passes = sum(ranking.passes for ranking in rankings) / len(rankings)
        label = "two stages, adaptive budget" if read == "adaptive" else "two stages"
        scores = torch.stack([ranking.scores for ranking in rankings])
        curve.add(label, passes, scores, *times.get(("rows", read), ()))


def not_in_use(curve: Curve, reading: Reading, budgets: tuple[int, ...]) -> None:
    """Add what else was tried, from exact scores."""
    bank, exact = reading.run.bank, reading.exact
    count = bank.manifest.directions
    coordinates = torch.cat([block.double() for _, _, block in bank.coordinates()])
    derivatives = reading.gradients.double() @ bank.directions(lines=slice(0, count)).double().T
    for k in sorted({min(k, count) for k in (16, 32, 64, 128, 256)}):
        estimate, rows = derivatives[:, :k] @ coordinates[:, :k].T, min(k, exact.shape[1])
        curve.add("directions alone", k + 1, estimate)
        best = estimate.topk(rows, 1).indices
        refined = estimate.scatter(1, best, exact.gather(1, best))
        curve.add("directions, then as many rows, no coarse scores", k + rows + 1, refined)
    for budget in [budget for budget in budgets if budget > 2 * TOP]:
        best = reading.coarse.topk(budget - 1, 1).indices
        curve.add("rows chosen by coarse scores alone", budget, reading.coarse.scatter(1, best, exact.gather(1, best)))
    for clusters in [clusters for clusters in (32, 64) if clusters < exact.shape[1] // 4]:
        scores, passes = in_clusters(reading.responses, exact, clusters, 3)
        curve.add(f"{clusters} clusters, the best 3 read", passes, scores)


def in_clusters(responses: Tensor, exact: Tensor, clusters: int, read: int) -> tuple[Tensor, float]:
    """Return scores from a direction per cluster of rows and exact rows in the best clusters, and passes per query."""
    unit = torch.nn.functional.normalize(responses.double())
    _, labels = kmeans2((unit @ unit.T).numpy(), clusters, seed=0, minit="++", iter=30)
    member = torch.nn.functional.one_hot(torch.tensor(labels, dtype=torch.int64), clusters).double()
    means = (exact @ member) / member.sum(0).clamp(min=1)
    inside = torch.zeros_like(means).scatter(1, means.topk(read, 1).indices, 1.0) @ member.T > 0
    return torch.where(inside, exact, means @ member.T), clusters + 1 + float(inside.sum(1).double().mean())


def by_depth(curve: Curve, reading: Reading, depths: tuple[int, ...]) -> None:
    """Add exact scores of the upper layers' responses alone; the time is of one pass along them."""
    parameters, layers, model = reading.parameters, reading.layers, reading.run.model
    for lowest in depths:
        sizes = zip(layers, parameters.sizes, strict=True)
        upper = torch.cat([torch.full((size,), layer >= lowest) for layer, size in sizes])
        names = [name for name, layer in zip(parameters.names, layers, strict=True) if layer >= lowest]
        own = TrackedParameters.of(model, [f"^{re.escape(name)}$" for name in names])
        directions, times = torch.randn(24, own.size), []
        for dtype in (None, torch.bfloat16):
            prepared = AnalyticJVP(model, own, CAUSAL_LM, reading.batch, dtype)
            ratio = cost(lambda p=prepared, d=directions: p.jvp(d), reading.plain, 3, time.process_time).ratio
            times.append(ratio / len(directions))
        scores = ((reading.gradients * upper) @ reading.responses.T).double()
        curve.add(f"exact, responses of layers {lowest} to {max(layers)}", 1, scores, *times)


def checked(reading: Reading, budget: int) -> dict[str, float]:
    """Return what real derivatives find in either precision, and how far their scores are off exact ones."""
    found: dict[str, float] = {"passes_read": budget}
    top = reading.exact.topk(TOP, 1).indices
    for precision in ("full", "half"):
        scorer = Scorer(reading.run.bank, reading.run.model, precision=precision)
        rankings, off = [scorer.rank(query, TOP, budget) for query in reading.queries], []
        for ranking, line in zip(rankings, reading.exact, strict=True):
            named = torch.cat([ranking.proponents.row_indices, ranking.opponents.row_indices])
            off.append(float((ranking.scores[named] - line[named]).norm() / line[named].norm()))
        shared = shared_top(torch.stack([ranking.scores for ranking in rankings]), top)
        found |= {f"top ten, {precision}": float(shared.mean()), f"scores off, {precision}": sum(off) / len(off)}
    return found
