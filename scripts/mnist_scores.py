"""Scores of small dense networks without vectors of parameters.

A digit's gradient in a dense layer is one column times one row, delta a^T, so that the inner product of two gradients
is the sum over layers of (a . a' + 1) (delta . delta'), the 1 for the bias. Everything that `hf_fwdattr.response`
does with Z (M, P) and row gradients (rows, P) needs such products only, and the same scores come a hundred times
faster; a test holds them against `Segment` itself. The filters and the shrinkage are the library's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mnist_world
import torch
from mnist_world import World
from torch import Tensor, nn

from hf_fwdattr.response.curvature import ledoit_wolf
from hf_fwdattr.response.horizon import Horizon, NaturalHorizon


@dataclass
class Gradients:
    """Gradients of n digits at one network: per layer what came in, (n, in + 1), and what came back, (n, out)."""

    inputs: list[Tensor]
    deltas: list[Tensor]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def __matmul__(self, other: "Gradients") -> Tensor:
        """(n, m) inner products, of gradients of the same or of different networks."""
        layers = zip(self.inputs, other.inputs, self.deltas, other.deltas, strict=True)
        return sum((a @ b.T) * (d @ e.T) for a, b, d, e in layers)  # type: ignore[return-value]

    def scaled(self, factor: Tensor | float) -> "Gradients":
        """Times a number, or one number for each digit (n, 1)."""
        return Gradients(self.inputs, [delta * factor for delta in self.deltas])

    def take(self, at: Tensor | slice) -> "Gradients":
        """Those of some of the digits."""
        return Gradients([x[at] for x in self.inputs], [x[at] for x in self.deltas])

    def dense(self) -> Tensor:
        """(n, P), as `torch` orders parameters: for tests and for the literal simulation."""
        blocks = []
        for a, d in zip(self.inputs, self.deltas, strict=True):
            blocks += [(d[:, :, None] * a[:, None, :-1]).flatten(1), d]
        return torch.cat(blocks, 1)


@torch.no_grad()
def logits_of(world: World, theta: Tensor, images: Tensor, seen: list[Tensor] | None = None) -> Tensor:
    """(n, classes), dropout off; what goes into each layer is put into `seen`."""
    values, x = mnist_world.unflat(world, theta), images
    for layer in range(0, len(values), 2):
        if seen is not None:
            seen.append(x)
        x = x @ values[layer].T + values[layer + 1]
        if layer < len(values) - 2:
            x = torch.relu(x)
    return x


@torch.no_grad()
def gradients(world: World, theta: Tensor, images: Tensor, labels: Tensor | None, seed: int = 0) -> Gradients:
    """Gradients of the digits' losses, dropout off; of labels drawn from the network where there are none."""
    values, activations = mnist_world.unflat(world, theta), []
    chances = logits_of(world, theta, images, activations).softmax(1)
    if labels is None:
        labels = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed)).flatten()
    wanted = nn.functional.one_hot(labels, world.widths[-1]).to(chances.dtype)
    return _traced(values, activations, chances - wanted)


@torch.no_grad()
def all_labels(world: World, theta: Tensor) -> tuple[Gradients, Tensor]:
    """Gradients of every row with every label: inputs (rows, in + 1), deltas (rows x classes, out); and chances."""
    values, activations = mnist_world.unflat(world, theta), []
    chances = logits_of(world, theta, world.images, activations).softmax(1)
    classes = chances.shape[1]
    back = chances.repeat_interleave(classes, 0) - torch.eye(classes).repeat(len(chances), 1)
    return _traced(values, activations, back, classes), chances


def _traced(values: list[Tensor], activations: list[Tensor], back: Tensor, copies: int = 1) -> Gradients:
    """Gradients from what comes back to the logits, with `copies` lines for each row of the activations."""
    deltas = [back]
    for layer in range(len(values) - 2, 0, -2):
        back = (back @ values[layer]) * (activations[layer // 2] > 0).repeat_interleave(copies, 0)
        deltas.insert(0, back)
    ones = torch.ones(len(activations[0]), 1, dtype=back.dtype)
    return Gradients([torch.cat([a, ones], 1) for a in activations], deltas)


@dataclass
class SegmentInfo:
    """A segment: weights in its middle, how far a push travels in it, and each row's share (rows,) of its loss."""

    theta: Tensor
    horizon: Horizon
    share: Tensor


def stretches(world: World, seed: int, count: int, moments: Sequence[mnist_world.Moment]) -> list[SegmentInfo]:
    """A run cut into `count` segments, with its true exposures; a snapshot must lie in the middle of each."""
    at = {moment.step: moment.theta for moment in moments}
    rows = len(world.images)
    per_epoch = -(-rows // world.batch)
    steps = per_epoch * world.epochs
    draws = mnist_world.Draws(seed, world.widths)
    draws.weights()
    exposure = torch.zeros(count, rows, dtype=torch.float64)
    edges = [round(number * steps / count) for number in range(count + 1)]
    step = 0
    for _ in range(world.epochs):
        order, _ = draws.epoch(rows)
        for start in range(0, rows, world.batch):
            batch = order[start : start + world.batch]
            number = next(n for n in range(count) if step < edges[n + 1])
            exposure[number, batch] += 1.0 / len(batch)
            step += 1
    lengths = [b - a for a, b in pairwise(edges)]
    return [
        SegmentInfo(
            at[edges[number] + max(1, lengths[number] // 2)],
            NaturalHorizon(mnist_world.RATE * lengths[number] / (1 - mnist_world.MOMENTUM)),
            exposure[number] / lengths[number],
        )
        for number in range(count)
    ]


def middles(world: World, counts: Sequence[int]) -> tuple[int, ...]:
    """Steps at which snapshots are needed for these numbers of segments."""
    steps = -(-len(world.images) // world.batch) * world.epochs
    found = set()
    for count in counts:
        edges = [round(number * steps / count) for number in range(count + 1)]
        found |= {a + max(1, (b - a) // 2) for a, b in pairwise(edges)}
    return tuple(sorted(found))


class Spectrum:
    """Curvature at one network: Z (M, P), and functions of Z^T Z by its Gram matrix.

    Args:
        samples (`int`): M.
        proportional (`bool`): pairs of digit and label are drawn in proportion to their share of the trace, so that
            all lines of Z are equally long: the mean over labels is exact, and a few long lines do not drown the rest.
            Otherwise one label is drawn from the network for each digit, as the library does.
        shrink (`bool`): by Ledoit and Wolf's estimate, as the library does.
    """

    def __init__(
        self, world: World, theta: Tensor, samples: int, seed: int = 0, proportional: bool = True, shrink: bool = True
    ):
        rows, generator = len(world.images), torch.Generator().manual_seed(seed)
        if proportional:
            everyone, chances = all_labels(world, theta)
            classes = chances.shape[1]
            squares = zip(everyone.inputs, everyone.deltas, strict=True)
            square = sum(a.square().sum(1).repeat_interleave(classes) * d.square().sum(1) for a, d in squares)
            trace = torch.as_tensor(square) * chances.flatten() / rows
            at = torch.multinomial(trace, samples, replacement=True, generator=generator)
            drawn = Gradients([a[at // classes] for a in everyone.inputs], [d[at] for d in everyone.deltas])
            weight = chances.flatten()[at] / rows * trace.sum() / (samples * trace[at])
            self.factor = drawn.scaled(weight.sqrt()[:, None])
        else:
            at = torch.randperm(rows, generator=generator).repeat(-(-samples // rows))[:samples]
            self.factor = gradients(world, theta, world.images[at], None, seed + 1).scaled(samples**-0.5)
        gram = self.factor @ self.factor
        values, vectors = torch.linalg.eigh(gram)
        kept = values > values.max() * torch.finfo(gram.dtype).eps * 10
        self.measured, self.vectors = values[kept].double(), vectors[:, kept].double()
        self.shrinkage = ledoit_wolf(gram.double(), len(theta)) if shrink else 0.0
        self.values = self.measured * (1 - self.shrinkage)

    def mix(self, function, seen: Tensor) -> tuple[float, Tensor]:
        """f(H) c = floor c + Z^T a, from seen = Z c (M, queries): the floor and a (M, queries)."""
        floor = function(torch.zeros(1, dtype=torch.float64))
        gain = (function(self.values) - floor) / self.measured
        return float(floor), (self.vectors * gain) @ (self.vectors.T @ seen.double())


def scores(
    world: World,
    queries: Gradients,
    run: list[SegmentInfo],
    spectra: list[Spectrum],
    rows: Tensor | None = None,
    every_end: bool = False,
) -> Tensor:
    """(queries, rows) in nats: what `Segment.adjoint` and row gradients give, through inner products alone.

    Args:
        queries (`Gradients`): of the queries' losses, at the end of training.
        run, spectra: the segments, first to last, and the curvature of each.
        every_end (`bool`): the mean of what the run's first 1, 2, ... segments alone would give. The walk is linear,
            so that one suffices: an equal part of the queries joins it at the end of each segment.
    """
    rows = torch.arange(len(world.images)) if rows is None else rows
    result = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    joining = 1.0 / len(run) if every_end else 0.0
    scale = torch.full((1,), 0.0 if every_end else 1.0, dtype=torch.float64)  # of the queries' own gradients in it
    later: list[tuple[Gradients, Tensor]] = []  # samples and how much of each the covector holds, (M, queries)
    for number in range(len(run) - 1, -1, -1):
        stretch, spectrum = run[number], spectra[number]
        scale = scale + joining
        seen = scale * (spectrum.factor @ queries).double()
        for factor, held in later:
            seen += (spectrum.factor @ factor).double() @ held
        floor, mixed = spectrum.mix(stretch.horizon.push, seen)
        own = gradients(world, stretch.theta, world.images[rows], world.labels[rows])
        pulled = floor * scale * (queries @ own).double() + mixed.T @ (spectrum.factor @ own).double()
        for factor, held in later:
            pulled += floor * held.T @ (factor @ own).double()
        result += pulled * stretch.share[rows]
        floor, mixed = spectrum.mix(stretch.horizon.decay, seen)
        scale = scale * floor
        later = [(factor, held * floor) for factor, held in later] + [(spectrum.factor, mixed)]
    return result
