"""Trained MNIST networks, what retraining says of them, and the methods that score their rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_fwdattr.evaluation.agreement import Agreement, loo
from hf_fwdattr.evaluation.designs import random_halves, without_rows
from hf_fwdattr.evaluation.metrics import lds
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.response.horizon import ExplicitHorizon, Horizon, NaturalHorizon

from ..corpora import cache_folder
from ..worlds.mnist import MOMENTUM, RATE, Digits, Moment, flat, outcomes, train_many
from .inner_products import Gradients, SegmentInfo, Spectrum, gradients, middles, scores, segments


FIRST_SEED = 10_000  # of the networks that are attributed; rows are left out of the first one's run
SEGMENTS = (1, 3, 5, 10)


class Truth:
    """Outcomes of halves (seeds, halves, queries), and of rows left out of the first network's run."""

    def __init__(self, world: Digits):
        train, folder, count = outcomes(world), cache_folder() / "retrainings", len(world.images)
        self.halves = random_halves(count, world.halves)
        self.outcomes = retrain(
            train, self.halves, range(world.seeds), folder, "halves", name=world.version, group_size=10
        )
        self.mean = self.outcomes.mean(0)
        self.removed = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: world.removed]
        self.without = retrain(
            train, without_rows(count, self.removed), [FIRST_SEED], folder, "rows left out", name=world.version,
            group_size=12,
        )[0]  # fmt: skip

    def lds(self, scores: Tensor) -> float:
        """Return the LDS of scores (queries, rows), of as many queries as they have."""
        return lds(scores, self.halves, self.mean[:, : len(scores)]).mean

    def left_out(self, scores: Tensor) -> Agreement:
        """Compare scores of the first network with leave-one-out."""
        return loo(scores, self.removed, self.without[:, : len(scores)])


class Network:
    """A trained network: its weights, its snapshots, and its curvature, computed once."""

    def __init__(self, world: Digits, seed: int, theta: Tensor, moments: list[Moment]):
        self.world, self.seed, self.theta, self.moments = world, seed, theta, moments
        self.at = {moment.step: moment.theta for moment in moments}
        self._spectra: dict[tuple[Any, ...], Spectrum] = {}

    def queries(self, theta: Tensor | None = None) -> Gradients:
        """Return the queries' gradients, at the end of training unless weights are given."""
        theta = self.theta if theta is None else theta
        return gradients(self.world, theta, self.world.query_images, self.world.query_labels)

    def rows(self, theta: Tensor) -> Gradients:
        """Return the rows' gradients."""
        return gradients(self.world, theta, self.world.images, self.world.labels)

    def spectrum(self, theta: Tensor, **settings: Any) -> Spectrum:
        """Return the curvature at these weights."""
        settings = {"samples": self.world.samples} | settings
        key = (float(theta.double().sum()), *settings.values())
        if key not in self._spectra:
            self._spectra[key] = Spectrum(self.world, theta, **settings)
        return self._spectra[key]

    def run(self, count: int, **settings: Any) -> tuple[list[SegmentInfo], list[Spectrum]]:
        """Return segments of the run, and the curvature of each."""
        run = segments(self.world, self.seed, count, self.moments)
        return run, [self.spectrum(segment.theta, **settings) for segment in run]

    def end(self, count: int, **settings: Any) -> Tensor:
        """Score with the library's response: segments of the run with its own horizon, queries at the end."""
        return scores(self.world, self.queries(), *self.run(count, **settings))

    def averaged(self, count: int, **settings: Any) -> Tensor:
        """Score with `averaging="trajectory"`: responses after each segment, queries at the mean of their weights."""
        run, spectra = self.run(count, **settings)
        asked = self.queries(torch.stack([segment.theta for segment in run]).mean(0))
        return scores(self.world, asked, run, spectra, average=True)

    def explicit(self, horizon: Horizon, **settings: Any) -> Tensor:
        """Score with one segment at the end of training, every row with an equal weight: the paper's form."""
        return self._single(self.theta, horizon, **settings)

    def snapshots(self, count: int = 5, **settings: Any) -> Tensor:
        """Score as if the run had ended at each of its snapshots, and return the mean."""
        rate, steps = RATE / (1 - MOMENTUM), middles(self.world, [count])
        parts = [self._single(self.at[step], NaturalHorizon(rate * step), **settings) for step in steps]
        return torch.stack(parts).mean(0)

    def dot(self) -> Tensor:
        """Score by gradient dot products at the end."""
        return (self.queries() @ self.rows(self.theta)) / len(self.world.images)

    def tracin(self, count: int = 5) -> Tensor:
        """Score by gradient dot products at the snapshots, query and row both there."""
        thetas = [self.at[step] for step in middles(self.world, [count])]
        return sum(self.queries(theta) @ self.rows(theta) for theta in thetas) / len(self.world.images)

    def _single(self, theta: Tensor, horizon: Horizon, **settings: Any) -> Tensor:
        count = len(self.world.images)
        info = SegmentInfo(theta, horizon, torch.full((count,), 1.0 / count, dtype=torch.float64))
        return scores(self.world, self.queries(theta), [info], [self.spectrum(theta, **settings)])


def networks(world: Digits) -> list[Network]:
    """Return the networks that are attributed, trained side by side and kept."""
    count = world.networks
    path = cache_folder() / "mnist-networks" / f"{world.version}-{count}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        seeds = [FIRST_SEED + number for number in range(count)]
        parameters, copies = train_many(world, [world.everyone] * count, seeds, moments=middles(world, SEGMENTS))
        ends = torch.stack([flat(parameters, number) for number in range(count)])
        steps = torch.tensor([moment.step for moment in copies[0]])
        thetas = torch.stack([torch.stack([moment.theta for moment in own]) for own in copies])
        torch.save({"ends": ends, "steps": steps, "thetas": thetas}, path)
    kept = torch.load(path, weights_only=True)
    moments = [[Moment(*pair) for pair in zip(kept["steps"].tolist(), own, strict=True)] for own in kept["thetas"]]
    ends = kept["ends"]
    return [Network(world, FIRST_SEED + number, ends[number], moments[number]) for number in range(count)]


# Those that are tried with several networks come first.
SEVERAL: dict[str, Callable[[Network], Tensor]] = {
    "five snapshots, each with its own response": lambda n: n.snapshots(),
    "ten segments, trajectory average": lambda n: n.averaged(10),
    "five segments, trajectory average": lambda n: n.averaged(5),
    "five segments": lambda n: n.end(5),
    "TracIn, five snapshots": lambda n: n.tracin(),
    "gradient dot product at the end": lambda n: n.dot(),
}
ONE: dict[str, Callable[[Network], Tensor]] = {
    "three segments": lambda n: n.end(3),
    "one segment": lambda n: n.end(1),
    "five segments, labels drawn as the library does": lambda n: n.end(5, proportional=False),
    "the paper's form at the end, 100 steps of 0.1": lambda n: n.explicit(ExplicitHorizon(100, 0.1, 0.0)),
}
