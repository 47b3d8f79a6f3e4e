"""Responses against retraining: train with one row's weight nudged up and down, and divide."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.response.curvature import Curvature
from hf_fwdattr.response.horizon import ExplicitHorizon, Horizon, NaturalHorizon
from hf_fwdattr.response.segment import Segment
from tests.helpers.cases import Classifier, Quadratic
from tests.helpers.reference import agree, exact_fisher, retrained


RATE, STEPS, DECAY = 1e-3, 2000, 0.2
ROW = 3


def descend(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], start: Tensor, loss: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Parameters after STEPS steps of a real optimizer on loss(theta, step)."""
    theta = start.clone().requires_grad_(True)
    optimizer = make([theta])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(theta, step).backward()
        optimizer.step()
    return theta.detach()


def trained(world: Quadratic, make: Callable[..., torch.optim.Optimizer], start: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from row weights to final parameters, on all rows at every step."""
    return lambda weights: descend(make, start, lambda theta, _: weights @ world.losses(theta) / world.rows)


def at_minimum(world: Quadratic, horizon: Horizon, diagonal: Tensor, weight_decay: float = 0.0) -> Segment:
    """Return a run that starts at its minimum and hence stays there, so that row gradients are constant."""
    row_weights = torch.full((world.rows,), 1.0 / world.rows, dtype=torch.float64)
    segment = Segment(world.minimum(weight_decay), diagonal, horizon, row_weights, weight_decay)
    segment.curvature = Curvature(world.factor * diagonal.sqrt(), weight_decay)
    return segment


def response(world: Quadratic, segment: Segment) -> Tensor:
    return segment.propagate(None, world.gradients(segment.theta) * segment.row_weights[:, None])


def frozen_adam(second_moment: Tensor, rate: float, weight_decay: float) -> Callable[..., torch.optim.Optimizer]:
    """Return an AdamW with constant second moments and without momentum, so that D is constant."""

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(
            parameters, lr=rate, betas=(0.0, 1 - 1e-13), eps=1e-12, weight_decay=weight_decay
        )
        optimizer.state[parameters[0]] = {
            "step": torch.tensor(1e16),
            "exp_avg": torch.zeros_like(parameters[0]),
            "exp_avg_sq": second_moment.clone(),
        }
        return optimizer

    return make


def test_sgd_response_equals_retraining() -> None:
    world = Quadratic()
    start, ones = world.minimum(), torch.ones(world.rows, dtype=torch.float64)
    measured = retrained(trained(world, lambda p: torch.optim.SGD(p, lr=RATE), start), ones, ROW, 1e-4)
    plain = torch.ones(world.size, dtype=torch.float64)
    steps = at_minimum(world, ExplicitHorizon(STEPS, RATE), plain)
    agree(response(world, steps)[ROW], measured, 1e-6)
    agree(response(world, at_minimum(world, NaturalHorizon(STEPS * RATE), plain))[ROW], measured, 1e-3)


def test_sgd_momentum_scales_the_horizon() -> None:
    world = Quadratic()
    start, ones = world.minimum(), torch.ones(world.rows, dtype=torch.float64)
    train = trained(world, lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9), start)
    segment = at_minimum(world, NaturalHorizon(STEPS * RATE / (1 - 0.9)), torch.ones(world.size, dtype=torch.float64))
    agree(response(world, segment)[ROW], retrained(train, ones, ROW, 1e-4), 1e-2)


@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
def test_adamw_response_equals_retraining(weight_decay: float) -> None:
    world = Quadratic()
    start, ones = world.minimum(weight_decay), torch.ones(world.rows, dtype=torch.float64)
    train = trained(world, frozen_adam(world.diagonal**-2, RATE, weight_decay), start)
    agree(train(ones), start, 1e-6)  # the run does stay where it starts
    measured = retrained(train, ones, ROW, 1e-4)
    horizon = NaturalHorizon(STEPS * RATE)
    agree(response(world, at_minimum(world, horizon, world.diagonal, weight_decay))[ROW], measured, 2e-3)


def test_response_of_a_row_seen_late_equals_retraining() -> None:
    """The row weighs nothing in the first segment; it is nudged around zero, so that the run stays at its minimum."""
    world = Quadratic()
    start, plain = world.minimum(), torch.ones(world.size, dtype=torch.float64)
    extra = torch.randn(world.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def train(weights: Tensor) -> Tensor:
        def loss(theta: Tensor, step: int) -> Tensor:
            late = weights[0] * (extra @ theta - 1.0).square() / 2 if step >= STEPS // 2 else 0.0
            return (world.losses(theta).sum() + late) / world.rows

        return descend(lambda p: torch.optim.SGD(p, lr=RATE), start, loss)

    first, second = (at_minimum(world, NaturalHorizon(STEPS * RATE / 2), plain) for _ in range(2))
    gradient = (extra * (extra @ start - 1.0))[None]
    late = second.propagate(first.propagate(None, 0.0 * gradient), gradient / world.rows)
    early = second.propagate(first.propagate(None, gradient / world.rows), 0.0 * gradient)
    measured = retrained(train, torch.zeros(1, dtype=torch.float64), 0, 1e-4)
    agree(late[0], measured, 1e-3)
    assert (early[0] - measured).norm() > 0.1 * measured.norm()


def test_more_segments_come_closer_to_retraining() -> None:
    """Far from the minimum, row gradients change on the way; each segment takes them from its middle."""
    world = Quadratic()
    start = world.minimum() + 1.0
    ones, plain = torch.ones(world.rows, dtype=torch.float64), torch.ones(world.size, dtype=torch.float64)
    train = trained(world, lambda p: torch.optim.SGD(p, lr=RATE), start)
    measured = retrained(train, ones, ROW, 1e-4)
    errors = []
    for count in (1, 3, 9, 27):
        length, carried = STEPS * RATE / count, None
        for index in range(count):
            segment = at_minimum(world, NaturalHorizon(length), plain)
            away = torch.linalg.matrix_exp(-world.hessian * (index + 0.5) * length) @ (start - world.minimum())
            pushes = world.gradients(world.minimum() + away) * segment.row_weights[:, None]
            carried = segment.propagate(carried, pushes)
        assert carried is not None
        errors.append(float((carried[ROW] - measured).norm() / measured.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 5e-3 < errors[0]


def test_softmax_response_at_the_minimum_equals_retraining() -> None:
    """Gauss-Newton is the Hessian of a linear softmax model, so the response is exact there too."""
    world = Classifier(rows=40)
    parameters = TrackedParameters.of(world.model, "trainable")
    x, labels = world.batch["x"][:, 0], world.batch["labels"][:, 0]

    def losses(theta: Tensor) -> Tensor:
        weight, bias = parameters.split(theta)
        return torch.nn.functional.cross_entropy(x @ weight.T + bias, labels, reduction="none")

    theta = parameters.read(world.model).requires_grad_(True)
    solver = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = losses(theta).mean()
        loss.backward()
        return loss

    solver.step(closure)
    minimum = theta.detach()
    parameters.write(world.model, minimum)

    def train(weights: Tensor) -> Tensor:
        return descend(
            lambda p: torch.optim.SGD(p, lr=5 * RATE), minimum, lambda t, _: weights @ losses(t) / world.rows
        )

    fisher = exact_fisher(world.model, parameters, world.objective, world.batch)
    values, vectors = torch.linalg.eigh(fisher)
    curvature = Curvature((vectors * values.clamp(min=0).sqrt()).T)
    gradients, tokens = PerSampleGradients(world.model, parameters, world.objective)(world.batch)
    assert tokens.tolist() == [1] * world.rows
    segment = Segment(
        minimum,
        torch.ones_like(minimum),
        NaturalHorizon(5 * RATE * STEPS),
        torch.full((world.rows,), 1 / world.rows, dtype=torch.float64),
        curvature=curvature,
    )
    measured = retrained(train, torch.ones(world.rows, dtype=torch.float64), ROW, 1e-4)
    agree(segment.propagate(None, gradients * segment.row_weights[:, None])[ROW], measured, 2e-3)
