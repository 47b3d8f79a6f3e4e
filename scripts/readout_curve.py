"""Accuracy against forward passes: everything that a query can be read with, on the small LoRA world.

    python scripts/readout_curve.py [--workers 2]

LDS is against the mean of three retrainings of 64 random halves (the ground truth of lds_lora.py, kept and resumed).
The top ten are the ten rows with the highest exact scores: how often all of them are the ten that were found, and what
share of them is. Two stages and the first look are what the pipeline does; what did not make it (directions alone, rows
without a first look, clusters, upper layers) is computed from the same exact scores.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import corpora
import lora_world
import torch
from lds_lora import train
from results import report
from scipy.cluster.vq import kmeans2
from torch import Tensor

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.query.shortlist import search


TOP = 10
PROBES = 256
BUDGETS = (1, 5, 9, 17, 33, 41, 65, 97, 129)


def fine_tune(world: lora_world.World, folder: str):
    """The fine-tune with its bank; the pipeline that reads it."""
    config = ResponseConfig(parameters="lora", directions=PROBES, source_column="source")
    callback = ResponseCallback(config)
    return lora_world.attributed(world, callback, folder)


def gradients_of(attribute, queries: list[dict]) -> Tensor:
    """(queries, P) of the log-likelihood, by reverse mode: the oracle."""
    reader = attribute._reader
    with frozen(attribute.model):
        exact = PerSampleGradients(attribute.model, reader.parameters, CAUSAL_LM)
        parts = [-exact(reader.batch(queries[at : at + 8]))[0] for at in range(0, len(queries), 8)]
    return torch.cat(parts).double()


def refined(estimate: Tensor, exact: Tensor, rows: int) -> Tensor:
    """The estimate with the exact scores of each query's best rows in it."""
    result = estimate.clone()
    best = estimate.topk(rows, 1).indices
    return result.scatter(1, best, exact.gather(1, best))


def in_clusters(responses: Tensor, exact: Tensor, clusters: int, opened: int) -> tuple[Tensor, float]:
    """Scores from a direction per cluster of rows and exact rows in the best clusters; and forward passes per query."""
    unit = torch.nn.functional.normalize(responses)
    _, labels = kmeans2((unit @ unit.T).numpy(), clusters, seed=0, minit="++", iter=30)
    member = torch.nn.functional.one_hot(torch.tensor(labels, dtype=torch.int64), clusters).double()
    means = (exact @ member) / member.sum(0).clamp(min=1)
    result, opened_of = means @ member.T, means.topk(opened, 1).indices
    inside = torch.zeros_like(means).scatter(1, opened_of, 1.0) @ member.T > 0
    return torch.where(inside, exact, result), clusters + 1 + float(inside.sum(1).double().mean())


class Curve:
    """Lines of the table."""

    def __init__(self, halves: Tensor, outcomes: Tensor, exact: Tensor, forward: float):
        self.halves, self.outcomes, self.exact, self.forward = halves, outcomes, exact, forward
        self.rows: list[dict] = []

    def add(self, method: str, forwards: float, scores: Tensor, seconds: float | None = None) -> None:
        """One way of reading: `scores` (queries, rows), and the seconds that one query took."""
        found, truth = scores.topk(TOP, 1).indices, self.exact.topk(TOP, 1).indices
        shared = torch.tensor(
            [len(set(a.tolist()) & set(b.tolist())) / TOP for a, b in zip(found, truth, strict=True)]
        )
        self.rows.append(
            {
                "method": method, "forward passes": round(forwards, 1),
                "LDS": lds(scores, self.halves, self.outcomes).mean,
                "all of the top ten": float((shared == 1).double().mean()), "of the top ten": float(shared.mean()),
                "time in forwards": "-" if seconds is None else round(seconds / self.forward, 1),
            }
        )  # fmt: skip
        print(self.rows[-1], flush=True)


def timed(work: Callable[[], Tensor], times: int) -> tuple[Tensor, float]:
    """What it returns, and seconds of the processor for each of `times` queries in it."""
    began = time.process_time()
    return work(), (time.process_time() - began) / times


def plain_forward(attribute, queries: list[dict]) -> float:
    """Seconds of the processor for one plain forward pass of one query, the median of many."""
    batch, spent = attribute._reader.batch(queries[:1]), []
    for _ in range(20):
        began = time.process_time()
        with torch.no_grad():
            CAUSAL_LM.forward(attribute.model, batch)
        spent.append(time.process_time() - began)
    return sorted(spent)[10]


def in_use(curve: Curve, attribute, queries: list[dict]) -> None:
    """What the pipeline does: a first look with exact directions, and two stages."""
    reader = attribute._reader
    reader.scores(queries[:1], budget=2)  # read before anything is timed
    for budget in BUDGETS:
        scores, seconds = timed(
            lambda budget=budget: torch.cat([reader.scores([query], budget=budget) for query in queries]), len(queries)
        )
        curve.add("first look, the rest along sums of responses", budget, scores.double(), seconds)
    for budget in BUDGETS[4:]:  # with fewer, the ten rows that are read on either side in any case would exceed it
        scores, seconds = timed(
            lambda budget=budget: torch.stack([reader.rank(query, TOP, budget)[1] for query in queries]), len(queries)
        )
        curve.add("two stages: first look, a quarter along sums, rows in turns", budget, scores, seconds)
    until_certain(curve, reader, queries)


def until_certain(curve: Curve, reader, queries: list[dict]) -> None:
    """Rows read until no other is likely to be among the ten, with the passes that this took."""
    read, opened = [], reader.engine.opened

    def counted(batch, staged=False):
        along = opened(batch, staged)

        def counting(directions):
            read.append(len(directions))
            return along(directions)

        return counting

    reader.engine.opened = counted
    scores, seconds = timed(
        lambda: torch.stack([reader.rank(query, TOP, "adaptive")[1] for query in queries]), len(queries)
    )
    del reader.engine.opened
    curve.add("two stages, until certain", 1 + sum(read) / len(queries), scores, seconds)


def not_in_use(curve: Curve, attribute, queries: list[dict], gradients: Tensor, responses: Tensor) -> None:
    """What else was tried, from exact scores."""
    bank = attribute.bank
    coordinates = torch.cat([block.double() for _, _, block in bank.coordinates()])
    readout = gradients @ bank.directions(lines=slice(0, PROBES)).double().T
    for k in (16, 32, 64, 128, PROBES):
        curve.add("directions alone", k + 1, readout[:, :k] @ coordinates[:, :k].T)
    for k, rows in ((32, 32), (64, 25), (64, 64), (128, 50)):
        estimate = readout[:, :k] @ coordinates[:, :k].T
        curve.add(
            f"{k} directions, then {rows} rows, no first look", k + rows + 1, refined(estimate, curve.exact, rows)
        )
    first = attribute._reader.scores(queries, budget=1).double()
    for budget in (33, 65, 97):
        found = [
            search(prior, None, TOP, budget - 1, lambda at, line=line: line[at][None]).estimate
            for prior, line in zip(first, curve.exact, strict=True)
        ]
        curve.add("rows chosen by the first look alone", budget, torch.stack(found))
    for clusters, opened in ((32, 3), (64, 3)):
        scores, forwards = in_clusters(responses, curve.exact, clusters, opened)
        curve.add(f"{clusters} clusters, the best {opened} opened", forwards, scores)
    parameters = attribute._reader.parameters
    for lowest in (1, 2):
        upper = torch.cat(
            [
                torch.full((size,), int(name.split(".h.")[1].split(".")[0]) >= lowest)
                for name, size in zip(parameters.names, parameters.sizes, strict=True)
            ]
        )
        curve.add(
            f"exact, responses in the upper {3 - lowest} of 3 layers",
            len(responses),
            (gradients * upper) @ responses.T,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started = time.time()
    world = lora_world.load()
    queries = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in world.queries]
    halves = random_halves(len(world.rows), 64)
    truth = Path(corpora.cache_folder()) / f"lds-lora-truth-{lora_world.VERSION}"
    outcomes = retrain(train, halves, range(1, 4), truth, workers=options.workers, name=lora_world.NAME).mean(0)
    with tempfile.TemporaryDirectory() as folder:
        attribute = fine_tune(world, folder)
        responses = torch.cat([block.unpacked() for block in attribute.bank.row_codes()]).double()
        gradients = gradients_of(attribute, queries)
        curve = Curve(halves, outcomes, gradients @ responses.T, plain_forward(attribute, queries))
        curve.add("exact (all rows' own responses)", len(responses) + 1, curve.exact)
        in_use(curve, attribute, queries)
        not_in_use(curve, attribute, queries, gradients, responses)
        manifest = attribute.bank.manifest
    picture(curve.rows)
    report(
        "readout_curve", "Accuracy against forward passes, small LoRA world", curve.rows, started,
        first_look_share=round(manifest.predictor_explained_variance, 4),
        bytes_per_row=round(sum(f.size for f in manifest.files if f.kind == "responses") / len(responses)),
    )  # fmt: skip


def picture(rows: list[dict]) -> None:
    """LDS and the top ten against forward passes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharex=True)
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(row["method"], []).append(row)
    for name, line in lines.items():
        if len(line) > 1:
            for axis, key in zip(axes, ("LDS", "of the top ten"), strict=True):
                axis.plot([row["forward passes"] for row in line], [row[key] for row in line], "o-", ms=3, label=name)
    for axis, key in zip(axes, ("LDS", "of the top ten"), strict=True):
        axis.axhline(rows[0][key], color="grey", lw=0.8, ls="--")
        axis.set(xscale="log", xlabel="forward passes per query", ylabel=key)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "results" / "readout_curve.png", dpi=110)


if __name__ == "__main__":
    main()
