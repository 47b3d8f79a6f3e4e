"""The paper's benchmark: attribution of a small network on 5,000 digits, against retraining.

    python scripts/mnist_mlp.py [--ablate] [--literal 10] [--sensitivity 2] [--peers FOLDER] [--tiny]

Ground truth: 50 random halves, each trained five times with a fresh seed (linear datamodeling score, on the mean loss
in nats of 500 queries); and single rows left out in the very run of the first network, same seed and order
(trajectory leave-one-out). Both are kept and resumed. The scores of one, five and ten networks are compared; those of
several are averaged. --peers reads what scripts/peers/mnist_dattri.py made of the same networks.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import corpora
import mnist_pictures
import mnist_scores
import mnist_world
import torch
from mnist_scores import SegmentInfo, Spectrum
from results import report
from torch import Tensor

from hf_fwdattr.evaluation.agreement import Agreement, loo
from hf_fwdattr.evaluation.cost import cost
from hf_fwdattr.evaluation.designs import random_halves, without_rows
from hf_fwdattr.evaluation.metrics import lds, noise_ceiling
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.response.horizon import ExplicitHorizon, NaturalHorizon


FIRST_SEED = 10_000  # of the networks that are attributed; the first is the one that rows are left out of
SEGMENTS = (1, 3, 5, 10)


class Truth:
    """What retraining says: outcomes of halves (seeds, halves, queries), and of left-out rows of the first network."""

    def __init__(self, world: mnist_world.World, halves: int, seeds: int, removed: int):
        cache = corpora.cache_folder()
        self.halves = random_halves(len(world.images), halves)
        self.outcomes = retrain(
            mnist_world.halves_outcomes(world), self.halves, range(seeds), cache / "mnist-halves", "halves",
            name=world.version, group_size=10,
        )  # fmt: skip
        self.mean = self.outcomes.mean(0)
        order = torch.randperm(len(world.images), generator=torch.Generator().manual_seed(0))
        self.removed = order[:removed]
        self.without = retrain(
            mnist_world.weighted_outcomes(world), without_rows(len(world.images), self.removed), [FIRST_SEED],
            cache / "mnist-removals", "rows left out", name=world.version, group_size=12,
        )[0]  # fmt: skip

    def judge(self, scores: Tensor) -> float:
        """LDS alone."""
        return lds(scores, self.halves, self.mean[:, : len(scores)]).mean

    def left_out(self, scores: Tensor) -> Agreement:
        """Leave-one-out of scores of the first network."""
        return loo(scores, self.removed, self.without[:, : len(scores)])


class Network:
    """One trained network: its end, its snapshots, and its gradients and curvature, computed once."""

    def __init__(self, world: mnist_world.World, seed: int, theta: Tensor, moments: list, samples: int):
        self.world, self.seed, self.theta, self.moments, self.samples = world, seed, theta, moments, samples
        self.at = {moment.step: moment.theta for moment in moments}
        self.end = self.queries(theta)
        self._spectra: dict[tuple, Spectrum] = {}

    def queries(self, theta: Tensor) -> mnist_scores.Gradients:
        return mnist_scores.gradients(self.world, theta, self.world.query_images, self.world.query_labels)

    def rows(self, theta: Tensor) -> mnist_scores.Gradients:
        return mnist_scores.gradients(self.world, theta, self.world.images, self.world.labels)

    def spectrum(self, theta: Tensor, **how) -> Spectrum:
        how = {"samples": self.samples} | how
        key = (float(theta.double().sum()), *how.values())
        if key not in self._spectra:
            self._spectra[key] = Spectrum(self.world, theta, **how)
        return self._spectra[key]

    def segments(self, count: int, **how) -> Tensor:
        """The library's response: segments of the run with its own horizon, read at the end."""
        run = mnist_scores.stretches(self.world, self.seed, count, self.moments)
        return mnist_scores.scores(self.world, self.end, run, [self.spectrum(s.theta, **how) for s in run])

    def mean_end(self, count: int, **how) -> Tensor:
        """The library's `averaging="trajectory"`: responses after each segment, read at the mean of the segments' weights."""
        run = mnist_scores.stretches(self.world, self.seed, count, self.moments)
        spectra = [self.spectrum(s.theta, **how) for s in run]
        asked = self.queries(torch.stack([stretch.theta for stretch in run]).mean(0))
        return mnist_scores.scores(self.world, asked, run, spectra, every_end=True)

    def explicit(self, horizon, **how) -> Tensor:
        """One stretch at the end of training, every row with an equal share: the paper's form."""
        return self._single(self.theta, horizon, self.end, **how)

    def ends(self, count: int = 5, **how) -> Tensor:
        """As if the run had ended at each of its snapshots: response and readout there, and the mean of them."""
        steps = mnist_scores.middles(self.world, [count])
        rate = mnist_world.RATE / (1 - mnist_world.MOMENTUM)
        parts = [
            self._single(self.at[step], NaturalHorizon(rate * step), self.queries(self.at[step]), **how)
            for step in steps
        ]
        return torch.stack(parts).mean(0)

    def dot(self) -> Tensor:
        """Gradient dot product at the end."""
        return self._share() * (self.end @ self.rows(self.theta))

    def tracin(self, count: int = 5) -> Tensor:
        """Gradient dot products at the snapshots, query and row both there."""
        thetas = [self.at[step] for step in mnist_scores.middles(self.world, [count])]
        return self._share() * sum(self.queries(theta) @ self.rows(theta) for theta in thetas)  # type: ignore[return-value]

    def _share(self) -> float:
        return 1.0 / len(self.world.images)

    def _single(self, theta: Tensor, horizon, queries, **how) -> Tensor:
        share = torch.full((len(self.world.images),), self._share(), dtype=torch.float64)
        return mnist_scores.scores(
            self.world, queries, [SegmentInfo(theta, horizon, share)], [self.spectrum(theta, **how)]
        )


def networks(world: mnist_world.World, count: int, samples: int) -> list[Network]:
    """The networks that are attributed, trained side by side and kept."""
    path = Path(corpora.cache_folder()) / "mnist-networks" / f"{world.version}-{count}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        seeds = [FIRST_SEED + number for number in range(count)]
        everyone = [torch.arange(len(world.images))] * count
        parameters, copies = mnist_world.train_many(
            world, everyone, seeds, moments=mnist_scores.middles(world, SEGMENTS)
        )
        ends = torch.stack([mnist_world.flat(parameters, number) for number in range(count)])
        steps = torch.tensor([moment.step for moment in copies[0]])
        thetas = torch.stack([torch.stack([moment.theta for moment in own]) for own in copies])
        torch.save({"ends": ends, "steps": steps, "thetas": thetas}, path)
    kept = torch.load(path, weights_only=True)
    steps = kept["steps"].tolist()
    return [
        Network(
            world, FIRST_SEED + number, kept["ends"][number],
            [mnist_world.Moment(*pair) for pair in zip(steps, kept["thetas"][number], strict=True)], samples,
        )
        for number in range(count)
    ]  # fmt: skip


# Those that are tried with several networks come first.
SEVERAL: dict[str, Callable[[Network], Tensor]] = {
    "five ends of the run, each read where it is": lambda n: n.ends(),
    "ten segments, mean of ends": lambda n: n.mean_end(10),
    "five segments, mean of ends": lambda n: n.mean_end(5),
    "five segments": lambda n: n.segments(5),
    "TracIn, five snapshots": lambda n: n.tracin(),
    "gradient dot product at the end": lambda n: n.dot(),
}
ONE: dict[str, Callable[[Network], Tensor]] = {
    "three segments": lambda n: n.segments(3),
    "one segment": lambda n: n.segments(1),
    "five segments, labels drawn as the library does": lambda n: n.segments(5, proportional=False),
    "the paper's form at the end, 100 steps of 0.1": lambda n: n.explicit(ExplicitHorizon(100, 0.1, 0.0)),
}


def line(method: str, truth: Truth, scores: list[Tensor], seconds: float | None) -> dict:
    """One line of the table, from the scores of each network."""
    one = [truth.judge(own) for own in scores]
    row: dict = {"method": method, "LDS 1": sum(one) / len(one), "low": min(one), "high": max(one)}
    for count in (5, 10):
        several = len(scores) >= count
        row[f"LDS {count}"] = truth.judge(torch.stack(scores[:count]).mean(0)) if several else "-"
    left = truth.left_out(scores[0])
    row |= {"LOO Spearman": left.spearman.mean, "LOO Pearson": left.pearson, "LOO slope": left.slope}
    return row | {"s": "-" if seconds is None else round(seconds, 1)}


def peers(folder: Path | None, truth: Truth) -> list[dict]:
    """Lines for scores (queries, rows) that another library made of the same networks; what failed, with its error."""
    lines = []
    for path in folder.glob("dattri *.pt") if folder is not None else []:
        kept = torch.load(path, weights_only=True)
        error = kept.get("error", "").splitlines()
        row = {"method": path.stem, "networks": int(kept["networks"])}
        row |= dict.fromkeys(("queries", "LDS", "LOO Spearman", "LOO Pearson"), "-")
        row |= {"s": round(float(kept["seconds"]), 1), "error": error[0] if error else "-"}
        if "scores" in kept:
            scores = kept["scores"].double()
            left = truth.left_out(scores)
            row |= {"queries": len(scores), "LDS": truth.judge(scores)}
            row |= {"LOO Spearman": left.spearman.mean, "LOO Pearson": left.pearson}
        lines.append(row)
    return sorted(lines, key=lambda row: (row["method"].split(",")[0], row["networks"], row["method"]))


def hand_out(folder: Path, world: mnist_world.World, attributed: list[Network], count: int) -> None:
    """What scripts/peers/mnist_dattri.py needs, as plain tensors: with more networks for what averages over many."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: getattr(world, name) for name in ("images", "labels", "query_images", "query_labels")}
    ends = [network.theta for network in attributed]
    while len(ends) < count:
        seeds = [FIRST_SEED + number for number in range(len(ends), min(len(ends) + 10, count))]
        parameters, _ = mnist_world.train_many(world, [torch.arange(len(world.images))] * len(seeds), seeds)
        ends += [mnist_world.flat(parameters, number) for number in range(len(seeds))]
    torch.save(given | {"ends": torch.stack(ends), "widths": torch.tensor(world.widths)}, folder / "given.pt")


def query_costs(network: Network, directions: int = 128) -> list[dict]:
    """Time of one query against one plain forward pass of it."""
    world, model = network.world, mnist_world.network(network.world, mnist_world.unflat(network.world, network.theta))
    model.eval()
    image, label = world.query_images[:1], world.query_labels[:1]
    table = {name: value.detach() for name, value in model.named_parameters()}
    directions = {name: torch.randn(directions, *value.shape) for name, value in table.items()}

    def loss(weights):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, weights, (image,)), label)

    def derivatives():
        def one(way):
            return torch.func.jvp(loss, (table,), (way,))[1]

        return torch.vmap(one)(directions)

    def backward():
        return torch.autograd.grad(torch.nn.functional.cross_entropy(model(image), label), list(model.parameters()))

    rows = len(world.images)
    lines = []
    with torch.no_grad():
        found = cost(derivatives, lambda: model(image), 20)
        lines.append(
            {"query": f"bank, {directions} directional derivatives", "forwards": found.ratio, "backward": "no"}
        )
    found = cost(backward, lambda: model(image), 20)
    lines.append(
        {
            "query": "gradient methods: one backward, row products apart",
            "forwards": found.ratio,
            "backward": "yes",
        }
    )
    lines.append({"query": "literal, two trajectories a row (counted)", "forwards": 2.0 * rows, "backward": "no"})
    lines.append({"query": "literal, one trajectory a row (counted)", "forwards": 1.0 + rows, "backward": "no"})
    return lines


def world_arguments(description: str) -> argparse.ArgumentParser:
    """What the world, its truth and its networks are made by."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--halves", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--removed", type=int, default=107)
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--samples", type=int, default=600, help="for the curvature of a snapshot")
    parser.add_argument("--tiny", action="store_true", help="a world of random blobs, in seconds")
    return parser


def main() -> None:
    parser = world_arguments(__doc__.splitlines()[0])
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--literal", type=int, default=0, help="rows that are simulated literally")
    parser.add_argument("--sensitivity", type=int, default=0, help="epochs after which single rows are nudged")
    parser.add_argument("--peers", type=Path, help="folder of scripts/peers/mnist_dattri.py")
    parser.add_argument("--hand-out", type=Path, help="write what the peers need into this folder, and stop")
    parser.add_argument("--peer-networks", type=int, default=50, help="how many they are given")
    options = parser.parse_args()
    started = time.time()
    world = mnist_world.tiny() if options.tiny else mnist_world.load()
    attributed = networks(world, options.networks, options.samples)
    if options.hand_out:
        hand_out(options.hand_out, world, attributed, options.peer_networks)
        return
    found: dict[str, tuple[list[Tensor], float]] = {}
    for method, scores in (SEVERAL | ONE).items():
        began, own = time.time(), attributed if method in SEVERAL else attributed[:1]
        values = [scores(network).float() for network in own]
        found[method] = values, (time.time() - began) / len(own)
        print(f"{method}: {found[method][1]:.1f} s a network", flush=True)
    truth = Truth(world, options.halves, options.seeds, options.removed)
    table = [line(method, truth, *values) for method, values in found.items()]
    ceiling = noise_ceiling(truth.outcomes)
    name = "mnist_tiny" if options.tiny else "mnist"
    report(
        f"{name}_mlp", f"{len(world.images)} digits: LDS of 1, 5 and 10 networks; {options.removed} rows left out",
        table, started, noise_ceiling=round(ceiling.mean, 4), halves=options.halves, seeds=options.seeds,
        samples=options.samples,
    )  # fmt: skip
    report(f"{name}_cost", "One query, in forward passes of it", query_costs(attributed[0]), started)
    if theirs := peers(options.peers, truth):
        ours = found["five segments, mean of ends"][0]  # on as many queries as those of them that answered fewer
        beside = {
            f"five segments, mean of ends, one network, {few} queries": sum(truth.judge(own[:few]) for own in ours)
            / len(ours)
            for few in sorted({row["queries"] for row in theirs} - {"-"})
        }
        report(f"{name}_peers", "The same networks, by dattri 0.3.0", theirs, started, **beside)
    if options.ablate:
        mnist_pictures.ablate(name, truth, attributed[0], started)
    if options.literal:
        mnist_pictures.literal(name, truth, attributed[0], options.literal, started)
    if options.sensitivity:
        mnist_pictures.sensitivity(name, world, truth.removed, FIRST_SEED, options.sensitivity, started)


if __name__ == "__main__":
    main()
