"""Accuracy against forward passes on MNIST: the top ten of five thousand digits, and LDS, without a first look.

    python scripts/mnist_curve.py [--queries 100]

The first network of scripts/mnist_mlp.py and its exact scores (five segments, means of ends). A first look is for
language models, so here there is none: what is expected of a query before it is read is nothing, and the kernel of two
stages is the covariance of exact scores themselves, each digit having been a query once. What a readout would say is
looked up in exact scores, with the pipeline's own search.
"""

import time

import mnist_mlp
import mnist_scores
import mnist_world
import torch
from results import report
from smollm2_curve import Curve, searched
from torch import Tensor

from hf_fwdattr.query.gaussian_process import error_covariance


BUDGETS = (33, 65, 129, 257, 513)
SEGMENTS = 5


class Kernel:
    """Stands where a bank's own responses stand: how scores go together, and its leading eigenvectors."""

    def __init__(self, scores: Tensor):
        self.kernel = error_covariance(scores).float()
        self._vectors = torch.linalg.eigh(self.kernel)[1].flip(1)

    def sums(self, count: int) -> tuple[Tensor, None]:
        """Weights (rows, n) of the sums that tell most."""
        return self._vectors[:, :count].double(), None


class Exact:
    """Scores (queries, rows) of five segments, means of ends."""

    def __init__(self, network: mnist_mlp.Network):
        self.network = network
        self.run = mnist_scores.stretches(network.world, network.seed, SEGMENTS, network.moments)
        self.mean = torch.stack([stretch.theta for stretch in self.run]).mean(0)

    def __call__(self, asked: mnist_scores.Gradients) -> Tensor:
        spectra = [self.network.spectrum(stretch.theta) for stretch in self.run]
        return mnist_scores.scores(self.network.world, asked, self.run, spectra, every_end=True)


def probed(scores: Tensor, kernel: Tensor, count: int) -> Tensor:
    """What `count` directions keep: scores projected on the leading eigenvectors of how they go together."""
    return scores @ kernel[:, :count] @ kernel[:, :count].T


def main() -> None:
    parser = mnist_mlp.world_arguments(__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    started = time.time()
    world = mnist_world.tiny() if options.tiny else mnist_world.load()
    network = mnist_mlp.networks(world, options.networks, options.samples)[0]
    truth = mnist_mlp.Truth(world, options.halves, options.seeds, options.removed)
    score = Exact(network)
    exact = score(network.queries(score.mean).take(slice(0, options.queries)))
    own = Kernel(score(network.rows(score.mean)))
    print(f"exact scores and their kernel after {time.time() - started:.0f} s", flush=True)
    curve = Curve(exact, truth.judge)
    curve.add("exact", len(world.images) + 1, exact)
    none = torch.zeros_like(exact)
    for budget in BUDGETS:
        curve.add("directions alone", budget, probed(exact, own.sums(budget - 1)[0], budget - 1))
        curve.add("two stages", *reversed(searched(none, exact, own, budget)))
        curve.add("two stages, no sums", *reversed(searched(none, exact, own, budget, share=0)))
    order = list(dict.fromkeys(row["method"] for row in curve.rows))
    curve.rows.sort(key=lambda row: order.index(row["method"]))
    name = "mnist_tiny_curve" if options.tiny else "mnist_curve"
    report(name, f"The top ten of {len(world.images)} digits, without a first look", curve.rows, started,
           queries=len(exact))  # fmt: skip


if __name__ == "__main__":
    main()
