"""Ablations of the paper's benchmark, as tables and pictures: what each setting costs or brings."""

import math
import time
from pathlib import Path

import mnist_scores
import mnist_world
import torch
from results import FOLDER, report
from torch import Tensor

from hf_fwdattr.evaluation.agreement import spearman
from hf_fwdattr.evaluation.designs import without_rows
from hf_fwdattr.response.horizon import ExplicitHorizon


def ablate(name: str, truth, network, started: float) -> None:
    """Horizon, step size, damping, curvature samples and directions, one at a time, on the first network."""
    lines = []

    def add(setting: str, value: float, scores: Tensor, began: float) -> None:
        left = truth.left_out(scores)
        lines.append(
            {"setting": setting, "value": float(value), "LDS": truth.judge(scores),
             "LOO Spearman": left.spearman.mean, "s": round(time.time() - began, 2)}
        )  # fmt: skip
        print(lines[-1], flush=True)

    for steps in (1, 10, 100, 1000, 10_000):
        began = time.time()
        add("K, steps of 0.1", steps, network.explicit(ExplicitHorizon(steps, 0.1, 0.0)), began)
    for size in (0.001, 0.01, 0.1):
        began = time.time()
        add("eta, 1000 steps", size, network.explicit(ExplicitHorizon(1000, size, 0.0)), began)
    for damping in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        began = time.time()
        add(
            "damping, infinitely many steps", damping, network.explicit(ExplicitHorizon(math.inf, 1.0, damping)), began
        )
    for samples in (50, 100, 200, 400, 800):
        began = time.time()
        add("curvature samples", min(samples, len(network.world.images)), network.ends(samples=samples), began)
    for ends in (1, 3, 5, 10):
        began = time.time()
        add("ends of the run", ends, network.ends(ends), began)
    for count in (1, 3, 5, 10):
        began = time.time()
        add("segments", count, network.segments(count), began)
    for count in (3, 5, 10):
        began = time.time()
        add("segments, mean of ends", count, network.mean_end(count), began)
    for directions, scores in truncated(network):
        add("directions k", directions, scores, time.time())
    report(f"{name}_ablation", "The first network, one setting at a time", lines, started)
    picture(FOLDER / f"{name}_ablation.png", lines)


def truncated(network, query_gradients: int = 1000) -> list[tuple[int, Tensor]]:
    """Scores of five segments through the k best directions, k rising: what `response.basis.factorize` would keep."""
    world = network.world
    run = mnist_scores.stretches(world, network.seed, 5, network.moments)
    spectra = [network.spectrum(stretch.theta) for stretch in run]
    chosen = torch.randperm(len(world.images), generator=torch.Generator().manual_seed(0))[:query_gradients]
    asked = network.rows(network.theta).take(chosen)
    whole = mnist_scores.scores(world, network.end, run, spectra)
    right = torch.linalg.svd(mnist_scores.scores(world, asked, run, spectra).float(), full_matrices=False)[2].double()
    ks = [k for k in (16, 64, 128, 256, 512) if k <= len(right)]
    return [(k, whole @ right[:k].T @ right[:k]) for k in ks] + [(len(world.images), whole)]


def literal(name: str, truth, network, count: int, started: float, steps: int = 10, size: float = 0.5) -> None:
    """The paper's algorithm taken literally for a few of the left-out rows: perturbation, one or two trajectories."""
    world, rows = network.world, truth.removed[:count]
    some = torch.arange(min(1000, len(world.images)))  # the objective whose gradient is followed
    exact = network.explicit(ExplicitHorizon(steps, size, 0.0))[:, rows]
    measured = (truth.without[1 : count + 1] - truth.without[0]).T
    lines = []
    for epsilon in (1e-3, 1e-1, 1.0, 10.0):
        for trajectories in (2, 1):
            began = time.time()
            found = simulated(world, network.theta, rows, some, steps, size, epsilon, trajectories)
            lines.append(
                {"perturbation": epsilon, "trajectories": trajectories,
                 "with the closed form": float(spearman(found.T, exact.T).mean()),
                 "LOO Spearman": float(spearman(found.T, measured.T).mean()), "s": round(time.time() - began, 1)}
            )  # fmt: skip
            print(lines[-1], flush=True)
    closed = float(spearman(exact.T, measured.T).mean())
    report(
        f"{name}_literal", f"Literal simulation of {count} rows, {steps} steps of {size}: rank correlations", lines,
        started, closed_form_loo=round(closed, 4),
    )  # fmt: skip


def simulated(
    world: mnist_world.World,
    theta: Tensor,
    rows: Tensor,
    some: Tensor,
    steps: int,
    size: float,
    epsilon: float,
    trajectories: int,
) -> Tensor:
    """(queries, rows) by forward passes alone: every row's networks walk side by side, then the queries are read.

    The row's loss is nudged by epsilon of its share in the mean; one trajectory is compared with where it started, so
    that what the network would have done by itself is in it, the same for all rows.
    """
    push = torch.tensor([1.0, -1.0][:trajectories]).repeat_interleave(len(rows))
    own = rows.repeat(trajectories)
    values = [v.repeat(len(own), *[1] * v.ndim) for v in mnist_world.unflat(world, theta)]
    start = [v[:1] for v in values]
    given = mnist_scores.gradients(world, theta, world.images[own], world.labels[own]).dense()
    given *= push[:, None] * epsilon / len(world.images)
    nudges = [
        part.view(v.shape) for part, v in zip(given.split([v[0].numel() for v in values], 1), values, strict=True)
    ]
    for _ in range(steps):
        slopes = _slopes(values, world, some)
        values = [v - size * (slope + nudge) for v, slope, nudge in zip(values, slopes, nudges, strict=True)]
    ends = -mnist_world.losses_many(world, values)
    if trajectories == 2:
        return ((ends[: len(rows)] - ends[len(rows) :]) / (2 * epsilon)).T
    return ((ends + mnist_world.losses_many(world, start)) / epsilon).T


def _slopes(values: list[Tensor], world: mnist_world.World, some: Tensor) -> list[Tensor]:
    """Gradient of the mean loss of some rows at each of the stacked networks."""
    values = [v.detach().requires_grad_() for v in values]
    logits = mnist_world.forward_many(values, world.images[some][None])
    labels = world.labels[some].expand(len(logits), -1)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    return list(torch.autograd.grad(losses.sum(), values))


def sensitivity(name: str, world: mnist_world.World, rows: Tensor, seed: int, epochs: int, started: float) -> None:
    """Can one row's removal be told from any other nudge? The row at other weights beside weight 0.

    Where training follows its derivative, changes grow with what was taken away, and weight 1.1 mirrors 0.9.
    """
    short = mnist_world.shortened(world, epochs=epochs)
    everyone = torch.arange(len(world.images))

    def change(factor: float) -> Tensor:
        weights = without_rows(len(world.images), rows)
        weights[weights == 0] = factor
        handfuls = (
            mnist_world.train_many(short, [everyone] * len(part), [seed] * len(part), part)[0]
            for part in weights.split(12)
        )
        losses = torch.cat([mnist_world.losses_many(short, networks) for networks in handfuls])
        return losses[1:] - losses[0]

    gone, lines = change(0.0), []
    for factor in (0.0, 0.5, 0.9, 1.1, 1 + 1e-6):
        found = gone if factor == 0.0 else change(factor)
        lines.append(
            {"weight of the row": str(factor), "rms change, nats": float(found.square().mean().sqrt()),
             "rank correlation with removal": float(spearman(found, gone).mean())}
        )  # fmt: skip
    report(
        f"{name}_sensitivity", f"{len(rows)} rows, one at a time, after {epochs} epochs: what a weight changes", lines,
        started, epochs=epochs,
    )  # fmt: skip


def picture(path: Path, lines: list[dict]) -> None:
    """Quality against each setting, one small panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    settings = list(dict.fromkeys(line["setting"] for line in lines))
    figure, axes = pyplot.subplots(
        2, -(-len(settings) // 2), figsize=(2.6 * -(-len(settings) // 2), 4.6), squeeze=False
    )
    for axis, setting in zip(axes.flat, settings, strict=False):
        own = [line for line in lines if line["setting"] == setting]
        for key, style in (("LDS", "o-"), ("LOO Spearman", "s--")):
            axis.plot([line["value"] for line in own], [line[key] for line in own], style, markersize=3, label=key)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_title(setting, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(settings) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    print(f"wrote {path.name}")
