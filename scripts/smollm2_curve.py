"""Accuracy against forward passes on SmolLM2-135M: the top ten of two thousand rows, 64 output tokens a query.

    python scripts/smollm2_curve.py [--rows 2000] [--timed 3]

What a readout would say is looked up in exact scores (gradients by reverse mode times the rows' own responses), with
the pipeline's own search; that a real readout says the same is checked on one query. Time is the processor's, of real
readouts, in plain float32 forward passes of the same query.
"""

import argparse
import re
import time
from collections.abc import Callable

import torch
from readout_curve import gradients_of
from results import report
from smollm2_world import QUERY, world
from torch import Tensor

from hf_fwdattr.jvp.analytic import AnalyticJVP
from hf_fwdattr.jvp.backend import Backend
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import Parameters
from hf_fwdattr.query.gaussian_process import GaussianProcess
from hf_fwdattr.query.row_codes import BankResponses
from hf_fwdattr.query.shortlist import search


TOP = 10
BUDGETS = (21, 33, 41, 65, 97, 129, 193)
TIMED = (33, 97, 129)
REAL = 129  # forward passes of queries that are really read
DEPTHS = (0, 10, 20, 25)  # lowest layer that responds


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Of the processor, per call; the second call on."""
    work()
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


class Curve:
    """Lines of the table, against exact scores (queries, rows)."""

    def __init__(self, exact: Tensor, judge: Callable[[Tensor], float] | None = None):
        self.exact, self.rows, self._judge = exact, list[dict](), judge
        self.top = exact.topk(TOP, 1).indices

    def add(
        self, method: str, forwards: float, scores: Tensor, spent: float | None = None, half: float | None = None
    ) -> None:
        """One way of reading; `spent` in plain forwards, and `half` with products in bfloat16."""
        found = scores.topk(TOP, 1).indices
        shared = torch.tensor(
            [len(set(a.tolist()) & set(b.tolist())) / TOP for a, b in zip(found, self.top, strict=True)]
        )
        joined = torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(scores, self.exact, strict=True)]
        )
        self.rows.append(
            {
                "method": method, "forward passes": round(forwards, 1), "of the top ten": float(shared.mean()),
                "all of the top ten": float((shared == 1).double().mean()), "correlation": float(joined.mean()),
                "time in forwards": "-" if spent is None else round(spent, 2),
                "in bfloat16": "-" if half is None else round(half, 2),
            }
        )  # fmt: skip
        if self._judge is not None:
            self.rows[-1] = {"LDS": self._judge(scores.float())} | self.rows[-1]
        print(self.rows[-1], flush=True)


def searched(
    first: Tensor, exact: Tensor, own: BankResponses | None, budget: int | None, share: int = 4
) -> tuple[Tensor, float]:
    """Estimates (queries, rows) after the pipeline's own search, and passes per query."""
    found, passes = [], 0
    for prior, line in zip(first, exact, strict=True):
        sums = 0 if own is None or not share else 16 if budget is None else (budget - 1) // share
        learned = None if own is None else GaussianProcess(prior, own.kernel)
        if sums:
            weights, _ = own.sums(sums)
            learned.mixtures(weights, weights.T @ (line - prior))
        estimate = prior if learned is None else learned.expected()
        rows = None if budget is None else budget - 1 - sums
        result = search(estimate, learned, TOP, rows, lambda at, line=line: line[at][None])
        found.append(result.estimate)
        passes += 1 + sums + len(result.places)
    return torch.stack(found), passes / len(first)


def summed(first: Tensor, exact: Tensor, own: BankResponses, count: int) -> Tensor:
    """(queries, rows) from a first look and passes along sums of responses."""
    weights, _ = own.sums(count)
    found = []
    for prior, line in zip(first, exact, strict=True):
        learned = GaussianProcess(prior, own.kernel)
        learned.mixtures(weights, weights.T @ (line - prior))
        found.append(learned.expected())
    return torch.stack(found)


def cosines(attribute, gradients: Tensor, queries: list[dict]) -> dict[int, float]:
    """Layer -> cosine of predicted with exact gradients, over all queries."""
    reader = attribute._reader
    predicted = torch.cat([reader._gradients([query]) for query in queries]).float()
    pieces = zip(reader.parameters.names, predicted.split(reader.parameters.sizes, 1),
                 gradients.split(reader.parameters.sizes, 1), strict=True)  # fmt: skip
    layers: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for name, said, real in pieces:
        layers.setdefault(int(re.search(r"layers\.(\d+)", name)[1]), []).append((said.flatten(), real.flatten()))
    joined = {layer: [torch.cat(side) for side in zip(*pairs, strict=True)] for layer, pairs in layers.items()}
    return {layer: round(float(torch.cosine_similarity(*sides, dim=0)), 2) for layer, sides in joined.items()}


def by_depth(attribute, gradients: Tensor, responses: Tensor, curve: Curve, plain: float, query: dict) -> None:
    """Exact scores of the upper layers' responses alone, and what a pass along them takes."""
    model, parameters = attribute.model, attribute._reader.parameters
    layer = [int(re.search(r"layers\.(\d+)", name)[1]) for name in parameters.names]
    batch = attribute._reader.batch([query])
    for lowest in DEPTHS:
        upper = torch.cat(
            [torch.full((size,), own >= lowest) for own, size in zip(layer, parameters.sizes, strict=True)]
        )
        chosen = [name for name, own in zip(parameters.names, layer, strict=True) if own >= lowest]
        own = Parameters.of(model, [f"^{re.escape(name)}$" for name in chosen])
        directions = torch.randn(24, own.size)
        each = []
        for dtype in (None, torch.bfloat16):
            read = AnalyticJVP(model, own, CAUSAL_LM, batch, dtype).along
            each.append(
                seconds(lambda read=read, directions=directions: read(directions), 3) / len(directions) / plain
            )
        scores = (gradients * upper) @ responses.T
        curve.add(
            f"exact, responses of layers {lowest} to {max(layer)}; time is of one pass", 1, scores.double(), *each
        )


def timings(attribute, queries: list[dict], plain: float) -> dict[str, float]:
    """Real readouts, in plain forwards per query."""
    reader, found = attribute._reader, {}
    ways: dict[str, Callable[[dict], object]] = {"first": lambda query: reader.scores([query], budget=1)}
    for budget in TIMED:
        ways[f"stages {budget}"] = lambda query, budget=budget: reader.rank(query, TOP, budget)
    ways["sources"] = lambda query: attribute.source_scores([query])
    for precision in ("full", "half"):
        reader.engine = Backend(attribute.model, reader.parameters, precision=precision)
        for name, way in ways.items():
            way(queries[0])
            found[f"{name} {precision}"] = sum(seconds_once(way, query) for query in queries) / len(queries) / plain
            print(name, precision, found[f"{name} {precision}"], flush=True)
    return found


def found_for_real(attribute, queries: list[dict], exact: Tensor) -> dict[str, float]:
    """What share of the top ten real readouts find, in either precision, and how far their scores are off."""
    reader, found = attribute._reader, {}
    for precision in ("full", "half"):
        reader.engine = Backend(attribute.model, reader.parameters, precision=precision)
        shared, off = 0.0, 0.0
        for query, line in zip(queries, exact, strict=True):
            sides, estimate = reader.rank(query, TOP, REAL)
            shared += len(set(estimate.topk(TOP).indices.tolist()) & set(line.topk(TOP).indices.tolist())) / TOP
            named = torch.cat([side.positions for side in sides])
            off += float((estimate[named] - line[named]).norm() / line[named].norm())
        found |= {f"top ten, {precision}": shared / len(queries), f"scores off, {precision}": off / len(queries)}
    return found


def seconds_once(way: Callable[[dict], object], query: dict) -> float:
    began = time.process_time()
    way(query)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--timed", type=int, default=3, help="queries whose real readouts are timed")
    parser.add_argument("--real", type=int, default=45, help="queries that are really read, and compared")
    options = parser.parse_args()
    started = time.time()
    attribute, queries = world(options.rows)
    reader = attribute._reader
    gradients = gradients_of(attribute, queries).float()
    responses = reader._own._unpacked
    exact = (gradients @ responses.T).double()
    first = torch.cat([reader.scores([query], budget=1).double() for query in queries])
    own, bank = reader._own, attribute.bank
    coordinates = torch.cat([block for _, _, block in bank.coordinates()])
    with torch.no_grad():
        batch = reader.batch(queries[:1])
        plain = seconds(lambda: CAUSAL_LM.forward(attribute.model, batch), 5)
    reader.engine = Backend(attribute.model, reader.parameters, precision="full")
    once = reader.rank(queries[0], TOP, 33)[1]
    looked_up = searched(first[:1], exact[:1], own, 33)[0][0]
    agreement = float((once - looked_up).norm() / looked_up.norm())
    real = found_for_real(attribute, queries[: options.real], exact[: options.real])
    print(real, flush=True)
    spent = timings(attribute, queries[: options.timed], plain)
    curve = Curve(exact)
    curve.add("exact (all rows' own responses)", len(responses) + 1, exact)
    curve.add("first look", 1, first, spent["first full"])
    for count in (16, 32, 64, 128):
        scores = (gradients @ bank.directions(lines=slice(0, count)).T).double() @ coordinates[:, :count].double().T
        curve.add("directions alone", count + 1, scores)
        curve.add("first look, the rest along sums", count + 1, summed(first, exact, own, count))
    none = torch.zeros_like(first)
    for budget in BUDGETS:
        times = (spent.get(f"stages {budget} {precision}") for precision in ("full", "half"))
        curve.add("two stages", *reversed(searched(first, exact, own, budget)), *times)
        curve.add("two stages, no sums", *reversed(searched(first, exact, own, budget, share=0)))
        curve.add("rows chosen by the first look alone", *reversed(searched(first, exact, None, budget)))
        curve.add("rows and sums, no first look", *reversed(searched(none, exact, own, budget)))
    curve.add("two stages, until certain", *reversed(searched(first, exact, own, None)))
    order = list(dict.fromkeys(row["method"] for row in curve.rows))
    curve.rows.sort(key=lambda row: order.index(row["method"]))
    by_depth(attribute, gradients, responses, curve, plain, queries[0])
    report(
        "smollm2_curve", f"The top {TOP} of {len(responses)} rows, SmolLM2-135M, {QUERY} output tokens", curve.rows,
        started, queries=len(queries), first_look_share=round(bank.manifest.predictor_explained_variance, 3),
        kept_by_128_probes=round(bank.manifest.explained_variance, 3), plain_forward_s=round(plain, 3),
        real_against_looked_up=agreement, cosine_by_layer=cosines(attribute, gradients, queries),
        nine_sources_in_forwards={name: round(spent[f"sources {name}"], 1) for name in ("full", "half")},
        really_read=REAL, queries_really_read=options.real, **real,
    )  # fmt: skip


if __name__ == "__main__":
    main()
