"""The paper's benchmark: attribution of a small network on 5,000 digits, against retraining.

Ground truth: 50 random halves, each trained five times with a fresh seed (LDS on the mean loss of 500 queries), and
single rows left out of the very run of the first network, same seed and order. Both are kept and resumed. The scores
of one, five and ten networks are compared; those of several are averaged. --hand-out writes the networks for
peers/mnist_dattri.py, and --peers judges what that made of them. `--world mnist-blobs` takes seconds.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fwdattr.evaluation.agreement import spearman
from hf_fwdattr.evaluation.cost import cost
from hf_fwdattr.evaluation.designs import without_rows
from hf_fwdattr.evaluation.metrics import noise_ceiling
from hf_fwdattr.response.horizon import ExplicitHorizon

from ..curve import Curve, ScoreBasis, two_stages
from ..methods.inner_products import Gradients, gradients, scores
from ..methods.mnist_networks import FIRST_SEED, ONE, SEVERAL, Network, Truth, networks
from ..registry import load_world
from ..report import pictures
from ..report.results import report, result_name
from ..worlds.mnist import Digits, flat, forward_many, losses_many, module, train_many, unflat


BUDGETS = (33, 65, 129, 257, 513)


def run(
    world: str = "mnist", peers: Path | None = None, hand_out: Path | None = None, peer_networks: int = 50
) -> None:
    """Score one, five and ten networks by every method, and compare with retraining."""
    started, chosen = time.time(), load_world(world)
    attributed = networks(chosen)
    if hand_out is not None:
        write_networks(hand_out, chosen, attributed, peer_networks)
        return
    found: dict[str, tuple[list[Tensor], float]] = {}
    for method, score in (SEVERAL | ONE).items():
        began, own = time.time(), attributed if method in SEVERAL else attributed[:1]
        found[method] = [score(network).float() for network in own], (time.time() - began) / len(own)
        print(f"{method}: {found[method][1]:.1f} s a network", flush=True)
    truth, name = Truth(chosen), result_name("lds", world)
    rows = [line(method, truth, *values) for method, values in found.items()]
    facts: dict[str, Any] = {"halves": chosen.halves, "seeds": chosen.seeds, "samples": chosen.samples}
    facts["noise_ceiling"] = round(noise_ceiling(truth.outcomes).mean, 4)
    title = f"{len(chosen.images)} digits: LDS of 1, 5 and 10 networks; {chosen.removed} rows left out"
    report(name, title, rows, started, **facts)
    report(result_name("cost", world), "One query, in forward passes of it", query_costs(attributed[0]), started)
    if peers is not None:
        theirs, ours = peer_lines(peers, truth), found["five segments, trajectory average"][0]
        beside = {
            f"five segments, trajectory average, one network, {few} queries":
            sum(truth.lds(own[:few]) for own in ours) / len(ours)
            for few in sorted({row["queries"] for row in theirs} - {"-"})
        }  # fmt: skip
        report(result_name("peers", world), "The same networks, by dattri 0.3.0", theirs, started, **beside)
        pictures.networks_lds({"rows": rows} | facts, name)


def line(method: str, truth: Truth, scores: list[Tensor], seconds: float) -> dict[str, Any]:
    """Return one line of the table, from the scores of each network."""
    one = [truth.lds(own) for own in scores]
    row: dict[str, Any] = {"method": method, "LDS 1": sum(one) / len(one), "low": min(one), "high": max(one)}
    for count in (5, 10):
        row[f"LDS {count}"] = truth.lds(torch.stack(scores[:count]).mean(0)) if len(scores) >= count else "-"
    left = truth.left_out(scores[0])
    row |= {"LOO Spearman": left.spearman.mean, "LOO Pearson": left.pearson, "LOO slope": left.slope}
    return row | {"s": round(seconds, 1)}


def query_costs(network: Network, directions: int = 128) -> list[dict[str, Any]]:
    """Return the time of one query against one plain forward pass of it."""
    world, model = network.world, module(network.world, network.theta)
    image, label = world.query_images[:1], world.query_labels[:1]
    table = {name: value.detach() for name, value in model.named_parameters()}
    tangents = {name: torch.randn(directions, *value.shape) for name, value in table.items()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, weights, (image,)), label)

    def derivatives() -> Tensor:
        return torch.vmap(lambda tangent: torch.func.jvp(loss, (table,), (tangent,))[1])(tangents)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.nn.functional.cross_entropy(model(image), label), list(model.parameters()))

    with torch.no_grad():
        forward_mode = cost(derivatives, lambda: model(image), 20).ratio
    reverse_mode, rows = cost(backward, lambda: model(image), 20).ratio, len(world.images)
    lines = (
        (f"bank, {directions} directional derivatives", forward_mode, "no"),
        ("gradient methods: one backward, row products apart", reverse_mode, "yes"),
        ("literal, two trajectories a row (counted)", 2.0 * rows, "no"),
        ("literal, one trajectory a row (counted)", 1.0 + rows, "no"),
    )
    return [{"query": query, "forwards": forwards, "backward": needs} for query, forwards, needs in lines]


def peer_lines(folder: Path, truth: Truth) -> list[dict[str, Any]]:
    """Return lines for scores (queries, rows) of another library, or the error of what failed."""
    lines = []
    for path in folder.glob("dattri *.pt"):
        kept = torch.load(path, weights_only=True)
        error = kept.get("error", "").splitlines()
        row = {"method": path.stem, "networks": int(kept["networks"])}
        row |= dict.fromkeys(("queries", "LDS", "LOO Spearman", "LOO Pearson"), "-")
        row |= {"s": round(float(kept["seconds"]), 1), "error": error[0] if error else "-"}
        if "scores" in kept:
            scores = kept["scores"].double()
            left = truth.left_out(scores)
            row |= {"queries": len(scores), "LDS": truth.lds(scores)}
            row |= {"LOO Spearman": left.spearman.mean, "LOO Pearson": left.pearson}
        lines.append(row)
    return sorted(lines, key=lambda row: (row["method"].split(",")[0], row["networks"], row["method"]))


def write_networks(folder: Path, world: Digits, attributed: list[Network], count: int) -> None:
    """Write digits and networks as plain tensors, with more networks for methods that average over many."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: getattr(world, name) for name in ("images", "labels", "query_images", "query_labels")}
    ends = [network.theta for network in attributed]
    while len(ends) < count:
        seeds = [FIRST_SEED + number for number in range(len(ends), min(len(ends) + 10, count))]
        parameters, _ = train_many(world, [world.everyone] * len(seeds), seeds)
        ends += [flat(parameters, number) for number in range(len(seeds))]
    torch.save(given | {"ends": torch.stack(ends), "widths": torch.tensor(world.widths)}, folder / "given.pt")


def run_ablation(world: str = "mnist") -> None:
    """Horizon, step size, damping, curvature samples, segments and directions on MNIST, one setting at a time."""
    started, chosen = time.time(), load_world(world)
    network, truth = networks(chosen)[0], Truth(chosen)
    rows, lines = len(chosen.images), list[dict[str, Any]]()
    tried: dict[str, tuple[Any, Any]] = {
        "K, steps of 0.1": ((1, 10, 100, 1000, 10_000), lambda k: network.explicit(ExplicitHorizon(k, 0.1, 0.0))),
        "eta, 1000 steps": ((0.001, 0.01, 0.1), lambda eta: network.explicit(ExplicitHorizon(1000, eta, 0.0))),
        "damping, infinitely many steps": (
            (1e-5, 1e-4, 1e-3, 1e-2, 1e-1), lambda d: network.explicit(ExplicitHorizon(math.inf, 1.0, d))
        ),
        "curvature samples": (
            [min(n, rows) for n in (50, 100, 200, 400, 800)], lambda n: network.snapshots(samples=n)
        ),
        "snapshots averaged": ((1, 3, 5, 10), network.snapshots),
        "segments": ((1, 3, 5, 10), network.end),
        "segments, trajectory average": ((3, 5, 10), network.averaged),
    }  # fmt: skip
    kept = dict(truncated(network))
    tried["directions k"] = tuple(kept), kept.get
    for setting, (values, score) in tried.items():
        for value in values:
            began, found = time.time(), score(value)
            left, spent = truth.left_out(found), round(time.time() - began, 2)
            lines.append({"setting": setting, "value": float(value), "LDS": truth.lds(found),
                          "LOO Spearman": left.spearman.mean, "s": spent})  # fmt: skip
            print(lines[-1], flush=True)
    report(result_name("ablation", world), "The first network, one setting at a time", lines, started)
    pictures.settings({"rows": lines}, result_name("ablation", world))


def truncated(network: Network, query_gradients: int = 1000) -> list[tuple[int, Tensor]]:
    """Return scores of five segments through the k best directions that `response.low_rank` would keep, k rising."""
    world, count = network.world, len(network.world.images)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:query_gradients]
    segments, spectra = network.run(5)
    whole = scores(world, network.queries(), segments, spectra)
    sampled = scores(world, network.rows(network.theta).take(chosen), segments, spectra).float()
    right = torch.linalg.svd(sampled, full_matrices=False)[2].double()
    ks = [k for k in (16, 64, 128, 256, 512) if k <= len(right)]
    return [(k, whole @ right[:k].T @ right[:k]) for k in ks] + [(count, whole)]


def run_sensitivity(world: str = "mnist", epochs: int = 50, rows: int = 2) -> None:
    """Can a row's removal be told from any other nudge on MNIST? The row at other weights beside weight 0.

    Where training follows its derivative, changes grow with what was taken away, and weight 1.1 mirrors 0.9.
    """
    started, chosen = time.time(), replace(load_world(world), epochs=epochs)
    count = len(chosen.images)
    nudged = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:rows]

    def change(factor: float) -> Tensor:
        weights = without_rows(count, nudged)
        weights[weights == 0] = factor
        parts = [train_many(chosen, [chosen.everyone] * len(part), [FIRST_SEED] * len(part), part)[0]
                 for part in weights.split(12)]  # fmt: skip
        losses = torch.cat([losses_many(chosen, trained) for trained in parts])
        return losses[1:] - losses[0]

    removal, lines = change(0.0), []
    for factor in (0.0, 0.5, 0.9, 1.1, 1 + 1e-6):
        found = removal if factor == 0.0 else change(factor)
        lines.append(
            {"weight of the row": str(factor), "rms change, nats": float(found.square().mean().sqrt()),
             "rank correlation with removal": float(spearman(found, removal).mean())}
        )  # fmt: skip
    title = f"{rows} rows, one at a time, after {epochs} epochs: what a weight changes"
    report(result_name(f"sensitivity_{epochs}_epochs", world), title, lines, started, epochs=epochs)


def run_budget_curve(world: str = "mnist", queries: int = 100) -> None:
    """The top ten of 5,000 digits against forward passes, without coarse scores.

    The first network and its exact scores (five segments, trajectory average). Gradient predictors are for language
    models, so a query's expected scores are zero before it is read, and what two stages read first are the leading
    combinations of exact scores themselves, each digit having been a query once. Derivatives are looked up in exact
    scores, with the library's own shortlist.
    """
    started, chosen = time.time(), load_world(world)
    network, truth = networks(chosen)[0], Truth(chosen)
    exact, basis = exact_scores(network, queries)
    curve = Curve(exact, truth.lds)
    curve.add("exact", len(chosen.images) + 1, exact)
    for budget in BUDGETS:
        vectors = basis.vectors[:, : budget - 1]
        curve.add("directions alone", budget, exact @ vectors @ vectors.T)
        for label, share in (("two stages", 4), ("two stages, no directions", 0)):
            values, passes = two_stages(exact, basis, budget, share)
            curve.add(label, passes, values)
    name = result_name("budget_curve", world)
    title = f"The top ten of {len(chosen.images)} digits, without coarse scores"
    report(name, title, curve.sorted(), started, queries=len(exact))
    pictures.budget_curve({"rows": curve.rows}, name)


def exact_scores(network: Network, queries: int, count: int = 5) -> tuple[Tensor, ScoreBasis]:
    """Return exact scores (queries, rows), and the basis of the rows' own scores."""
    segments, spectra = network.run(count)
    mean = torch.stack([segment.theta for segment in segments]).mean(0)

    def score(asked: Gradients) -> Tensor:
        return scores(network.world, asked, segments, spectra, average=True)

    return score(network.queries(mean).take(slice(0, queries))), ScoreBasis.of(score(network.rows(mean)), 256)


def run_literal(world: str = "mnist", rows: int = 10, steps: int = 10, size: float = 0.5) -> None:
    """The paper's algorithm taken literally: perturbation, one or two trajectories, for a few left-out digits."""
    started, chosen = time.time(), load_world(world)
    network, truth = networks(chosen)[0], Truth(chosen)
    left_out = truth.removed[:rows]
    exact = network.explicit(ExplicitHorizon(steps, size, 0.0))[:, left_out]
    measured = (truth.without[1 : rows + 1] - truth.without[0]).T
    lines = []
    for epsilon in (1e-3, 1e-1, 1.0, 10.0):
        for trajectories in (2, 1):
            began = time.time()
            found = simulated(chosen, network.theta, left_out, steps, size, epsilon, trajectories)
            lines.append(
                {"perturbation": epsilon, "trajectories": trajectories,
                 "with the closed form": float(spearman(found.T, exact.T).mean()),
                 "LOO Spearman": float(spearman(found.T, measured.T).mean()), "s": round(time.time() - began, 1)}
            )  # fmt: skip
            print(lines[-1], flush=True)
    title = f"Literal simulation of {rows} rows, {steps} steps of {size}: rank correlations"
    closed = round(float(spearman(exact.T, measured.T).mean()), 4)
    report(result_name("literal", world), title, lines, started, closed_form_loo=closed)


def simulated(
    world: Digits, theta: Tensor, rows: Tensor, steps: int, size: float, epsilon: float, trajectories: int
) -> Tensor:
    """Return (queries, rows) by forward passes alone: every row's networks move side by side, then queries are read.

    The row's loss is nudged by epsilon of its weight in the mean; one trajectory is compared with where it started, so
    that what the network would have done by itself is in it, the same for all rows. The gradient that is followed is
    that of the first 1000 rows' mean loss.
    """
    signs = torch.tensor([1.0, -1.0][:trajectories]).repeat_interleave(len(rows))
    own = rows.repeat(trajectories)
    values = [v.repeat(len(own), *[1] * v.ndim) for v in unflat(world, theta)]
    start, labels = [v[:1] for v in values], world.labels[:1000].expand(len(own), -1)
    pushes = gradients(world, theta, world.images[own], world.labels[own]).dense()
    pushes *= signs[:, None] * epsilon / len(world.images)
    parts = zip(pushes.split([v[0].numel() for v in values], 1), values, strict=True)
    nudges = [part.view(v.shape) for part, v in parts]
    for _ in range(steps):
        values = [v.detach().requires_grad_() for v in values]
        logits = forward_many(values, world.images[None, :1000])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
        slopes = torch.autograd.grad(losses.sum(), values)
        values = [v.detach() - size * (slope + nudge) for v, slope, nudge in zip(values, slopes, nudges, strict=True)]
    ends = -losses_many(world, values)
    if trajectories == 2:
        return ((ends[: len(rows)] - ends[len(rows) :]) / (2 * epsilon)).T
    return ((ends + losses_many(world, start)) / epsilon).T
