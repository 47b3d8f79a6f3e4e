"""Scores of small dense networks without vectors of parameters.

A digit's gradient in a dense layer is one column times one row, delta a^T, so that the inner product of two gradients
is the sum over layers of (a . a' + 1) (delta . delta'), the 1 for the bias. Everything that `hf_fwdattr.response`
does with Z (M, P) and row gradients (rows, P) needs such products only, and the same scores come a hundred times
faster; a test holds them against `Segment` itself. The filters and the shrinkage are the library's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hf_fwdattr.response.curvature import ledoit_wolf
from hf_fwdattr.response.horizon import Horizon, NaturalHorizon

from ..worlds.mnist import MOMENTUM, RATE, Digits, Draws, Moment, unflat


@dataclass
class Gradients:
    """Gradients of n digits at one network: per layer its input, (n, in + 1), and the output's gradient, (n, out)."""

    inputs: list[Tensor]
    deltas: list[Tensor]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __matmul__(self, other: "Gradients") -> Tensor:
        """Return (n, m) inner products, of gradients of the same or of different networks."""
        layers = zip(self.inputs, other.inputs, self.deltas, other.deltas, strict=True)
        return sum((a @ b.T) * (d @ e.T) for a, b, d, e in layers)  # type: ignore[return-value]

    def scaled(self, factor: Tensor | float) -> "Gradients":
        """Return them times a number, or times one number for each digit (n, 1)."""
        return Gradients(self.inputs, [delta * factor for delta in self.deltas])

    def take(self, index: Tensor | slice) -> "Gradients":
        """Return those of some of the digits."""
        return Gradients([x[index] for x in self.inputs], [x[index] for x in self.deltas])

    def dense(self) -> Tensor:
        """Return (n, P), as `torch` orders parameters: for tests and for the literal simulation."""
        blocks = []
        for a, d in zip(self.inputs, self.deltas, strict=True):
            blocks += [(d[:, :, None] * a[:, None, :-1]).flatten(1), d]
        return torch.cat(blocks, 1)


@torch.no_grad()
def probabilities(values: list[Tensor], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return class probabilities (n, classes), dropout off, and the input of each layer."""
    activations = [images]
    for layer in range(0, len(values) - 2, 2):
        activations.append(torch.relu(activations[-1] @ values[layer].T + values[layer + 1]))
    return (activations[-1] @ values[-2].T + values[-1]).softmax(1), activations


@torch.no_grad()
def gradients(world: Digits, theta: Tensor, images: Tensor, labels: Tensor | None, seed: int = 0) -> Gradients:
    """Return gradients of the digits' losses, dropout off; of labels drawn from the network if there are none."""
    values = unflat(world, theta)
    chances, activations = probabilities(values, images)
    if labels is None:
        labels = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed)).flatten()
    wanted = nn.functional.one_hot(labels, world.widths[-1]).to(chances.dtype)
    return _backward(values, activations, chances - wanted)


@torch.no_grad()
def all_labels(world: Digits, theta: Tensor) -> tuple[Gradients, Tensor]:
    """Return gradients of every row with every label, deltas (rows x classes, out), and the labels' chances."""
    values = unflat(world, theta)
    chances, activations = probabilities(values, world.images)
    classes = chances.shape[1]
    back = chances.repeat_interleave(classes, 0) - torch.eye(classes).repeat(len(chances), 1)
    return _backward(values, activations, back, classes), chances


def _backward(values: list[Tensor], activations: list[Tensor], back: Tensor, copies: int = 1) -> Gradients:
    """Return gradients from the logits' gradients, with `copies` lines for each row of the activations."""
    deltas = [back]
    for layer in range(len(values) - 2, 0, -2):
        back = (back @ values[layer]) * (activations[layer // 2] > 0).repeat_interleave(copies, 0)
        deltas.insert(0, back)
    ones = torch.ones(len(activations[0]), 1, dtype=back.dtype)
    return Gradients([torch.cat([a, ones], 1) for a in activations], deltas)


@dataclass
class SegmentInfo:
    """A segment: weights in its middle, its horizon, and the weight (rows,) of each row in its loss."""

    theta: Tensor
    horizon: Horizon
    row_weights: Tensor


def segments(world: Digits, seed: int, count: int, moments: Sequence[Moment]) -> list[SegmentInfo]:
    """Cut a run into segments, with its true row weights; a snapshot must lie in the middle of each."""
    thetas = {moment.step: moment.theta for moment in moments}
    draws = Draws(seed, world.widths)
    draws.weights()
    edges, step = _edges(world, count), 0
    weights = torch.zeros(count, len(world.images), dtype=torch.float64)
    for _ in range(world.epochs):
        order, _ = draws.epoch(len(world.images))
        for batch in order.split(world.batch):
            weights[next(n for n in range(count) if step < edges[n + 1]), batch] += 1.0 / len(batch)
            step += 1
    lengths = [end - start for start, end in pairwise(edges)]
    return [
        SegmentInfo(
            thetas[start + max(1, length // 2)], NaturalHorizon(RATE * length / (1 - MOMENTUM)), own / length
        )
        for start, length, own in zip(edges[:-1], lengths, weights, strict=True)
    ]  # fmt: skip


def middles(world: Digits, counts: Sequence[int]) -> tuple[int, ...]:
    """Return the steps at which snapshots are needed for these numbers of segments."""
    pairs = [pair for count in counts for pair in pairwise(_edges(world, count))]
    return tuple(sorted({start + max(1, (end - start) // 2) for start, end in pairs}))


def _edges(world: Digits, count: int) -> list[int]:
    steps = -(-len(world.images) // world.batch) * world.epochs
    return [round(number * steps / count) for number in range(count + 1)]


class Spectrum:
    """Curvature at one network: Z (M, P), and functions of Z^T Z by its Gram matrix.

    Args:
        samples (`int`): M.
        proportional (`bool`): pairs of digit and label are drawn in proportion to their share of the trace, so that
            all lines of Z are equally long: the mean over labels is exact, and a few long lines do not drown the rest.
            Otherwise one label is drawn from the network for each digit, as the library does.
    """

    def __init__(self, world: Digits, theta: Tensor, samples: int, seed: int = 0, proportional: bool = True):
        rows, generator = len(world.images), torch.Generator().manual_seed(seed)
        if proportional:
            everyone, chances = all_labels(world, theta)
            classes = chances.shape[1]
            squares = zip(everyone.inputs, everyone.deltas, strict=True)
            square = sum(a.square().sum(1).repeat_interleave(classes) * d.square().sum(1) for a, d in squares)
            trace = torch.as_tensor(square) * chances.flatten() / rows
            index = torch.multinomial(trace, samples, replacement=True, generator=generator)
            drawn = Gradients([a[index // classes] for a in everyone.inputs], [d[index] for d in everyone.deltas])
            weight = chances.flatten()[index] / rows * trace.sum() / (samples * trace[index])
            self.factor = drawn.scaled(weight.sqrt()[:, None])
        else:
            index = torch.randperm(rows, generator=generator).repeat(-(-samples // rows))[:samples]
            self.factor = gradients(world, theta, world.images[index], None, seed + 1).scaled(samples**-0.5)
        gram = self.factor @ self.factor
        values, vectors = torch.linalg.eigh(gram)
        kept = values > values.max() * torch.finfo(gram.dtype).eps * 10
        self.measured, self.vectors = values[kept].double(), vectors[:, kept].double()
        self.values = self.measured * (1 - ledoit_wolf(gram.double(), len(theta)))

    def apply(self, function: Callable[[Tensor], Tensor], projected: Tensor) -> tuple[float, Tensor]:
        """Return f(H) c = floor c + Z^T a, from Z c (M, queries): the floor and a (M, queries)."""
        floor = function(torch.zeros(1, dtype=torch.float64))
        gain = (function(self.values) - floor) / self.measured
        return float(floor), (self.vectors * gain) @ (self.vectors.T @ projected.double())


def scores(
    world: Digits, queries: Gradients, run: list[SegmentInfo], spectra: list[Spectrum], average: bool = False
) -> Tensor:
    """Return scores (queries, rows) in nats: those of `Segment.adjoint` and row gradients, by inner products alone.

    Args:
        queries (`Gradients`): of the queries' losses, at the end of training.
        run, spectra: the segments, first to last, and the curvature of each.
        average (`bool`): the mean of what the run's first 1, 2, ... segments alone would give. The recursion is
            linear, so that one suffices: an equal part of the queries joins it at the end of each segment.
    """
    result = torch.zeros(len(queries), len(world.images), dtype=torch.float64)
    joining = 1.0 / len(run) if average else 0.0
    scale = torch.full((1,), 0.0 if average else 1.0, dtype=torch.float64)  # of the queries' own gradients in it
    later: list[tuple[Gradients, Tensor]] = []  # samples, and how much of each is in the adjoint, (M, queries)
    for segment, spectrum in zip(reversed(run), reversed(spectra), strict=True):
        scale = scale + joining
        projected = scale * (spectrum.factor @ queries).double()
        for factor, held in later:
            projected += (spectrum.factor @ factor).double() @ held
        floor, mixed = spectrum.apply(segment.horizon.push, projected)
        own = gradients(world, segment.theta, world.images, world.labels)
        pulled = floor * scale * (queries @ own).double() + mixed.T @ (spectrum.factor @ own).double()
        for factor, held in later:
            pulled += floor * held.T @ (factor @ own).double()
        result += pulled * segment.row_weights
        floor, mixed = spectrum.apply(segment.horizon.decay, projected)
        scale = scale * floor
        later = [(factor, held * floor) for factor, held in later] + [(spectrum.factor, mixed)]
    return result
