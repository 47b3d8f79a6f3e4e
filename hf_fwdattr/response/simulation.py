"""Literal simulation of the paper's algorithm: train a little further with one row's loss nudged, and compare.

Two trajectories of K gradient steps start at theta_T, one with +epsilon times the row's gradient added to every step's
gradient and one with -epsilon; half their difference over epsilon is the row's response (arXiv 2511.19803). One
trajectory against theta_T itself costs half and is exact where theta_T is a minimum. On a quadratic both equal the
closed form of [`ExplicitHorizon`], -(1 - (1 - eta sigma)^K) / sigma applied to the gradient.

It is practical for few rows or sources; the package itself uses the closed form.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..gradients.per_sample import PerSampleGradients
from ..models.interrupts import uninterrupted
from ..models.likelihood import IGNORED, Batch, Objective, row_losses
from ..models.modes import trainable
from ..models.parameters import TrackedParameters
from .horizon import ExplicitHorizon


__all__ = ["objective_gradient", "simulate", "simulate_rows"]


def simulate(
    gradient: Callable[[Tensor], Tensor],
    theta: Tensor,
    push: Tensor,
    horizon: ExplicitHorizon,
    *,
    epsilon: float = 1e-3,
    trajectories: int = 2,
) -> Tensor:
    """Return the response (P,) of the parameters to a unit of `push`.

    Args:
        gradient (`Callable`): theta (P,) -> gradient (P,) of the training objective.
        theta (`Tensor`): theta_T, (P,).
        push (`Tensor`): (P,) gradient of the nudged loss, of a row or a source, over the number of supervised tokens.
        horizon (`ExplicitHorizon`): K, eta and lambda; K is finite, and the damping pulls towards theta_T.
        epsilon (`float`): size of the nudge.
        trajectories (`int`): 2 (central difference) or 1 (against theta_T).
    """

    def end(nudge: float) -> Tensor:
        at = theta.clone()
        for _ in range(int(horizon.steps)):
            at = at - horizon.step_size * (gradient(at) + horizon.damping * (at - theta) + nudge * push)
        return at

    if trajectories == 1:
        return (end(epsilon) - theta) / epsilon
    return (end(epsilon) - end(-epsilon)) / (2 * epsilon)


def objective_gradient(
    model: nn.Module, parameters: TrackedParameters, objective: Objective, batches: Sequence[Batch]
) -> Callable[[Tensor], Tensor]:
    """Return theta -> gradient of the mean loss per supervised token over `batches`, for [`simulate`].

    The model's tracked weights are left where the last call put them.
    """

    def gradient(theta: Tensor) -> Tensor:
        parameters.write(model, theta)
        live = parameters.tensors(model)
        total, tokens = torch.zeros_like(theta), 0
        with torch.enable_grad(), trainable(live):
            for batch in batches:
                logits, labels = objective.forward(model, batch)
                blocks = torch.autograd.grad(row_losses(logits, labels).sum(), live)
                total += torch.cat([block.reshape(-1).to(theta.dtype) for block in blocks])
                tokens += int((labels != IGNORED).sum())
        return total / tokens

    return gradient


def simulate_rows(
    model: nn.Module,
    parameters: TrackedParameters,
    objective: Objective,
    batches: Iterable[Batch],
    groups: Tensor,
    horizon: ExplicitHorizon,
    *,
    epsilon: float = 1e-3,
    trajectories: int = 2,
) -> Tensor:
    """Return the responses (groups, P) of a fine-tuned model to rows or sources by simulation; use inside `frozen`.

    Args:
        batches (`Iterable`): all training rows, in order.
        groups (`Tensor`): (groups, rows) zeros and ones: the rows that each group nudges.
        horizon, epsilon, trajectories: as of [`simulate`].
    """
    batches = list(batches)
    theta = parameters.read(model)
    rows = PerSampleGradients(model, parameters, objective)
    gradients, tokens = zip(*(rows(batch) for batch in batches), strict=True)
    pushes = groups.to(theta.dtype) @ torch.cat(gradients).to(theta.dtype) / torch.cat(tokens).sum()
    at = objective_gradient(model, parameters, objective, batches)
    try:
        responses = [simulate(at, theta, push, horizon, epsilon=epsilon, trajectories=trajectories) for push in pushes]
        return torch.stack(responses)
    finally:
        with uninterrupted():
            parameters.write(model, theta)
