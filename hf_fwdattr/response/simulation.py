"""The paper's algorithm, taken literally: train a little further with a row's loss nudged, and look where it went.

Two trajectories of K gradient steps start at theta_T, one with +epsilon times the row's gradient added to every step's
gradient and one with -epsilon; half their difference over epsilon is the row's response (arXiv 2511.19803). One
trajectory against theta_T itself costs half and is right where theta_T is a minimum. On a quadratic both equal the
closed form of [`ExplicitHorizon`], -(1 - (1 - eta sigma)^K) / sigma applied to the gradient.

This is practical for a handful of rows or sources; everything else uses the closed form.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..gradients.per_sample import PerSampleGradients
from ..models.likelihood import IGNORED, Batch, Objective, row_losses
from ..models.modes import trainable
from ..models.parameters import Parameters


def simulate(
    gradient: Callable[[Tensor], Tensor],
    theta: Tensor,
    push: Tensor,
    *,
    steps: int,
    step_size: float,
    damping: float = 0.0,
    epsilon: float = 1e-3,
    trajectories: int = 2,
) -> Tensor:
    """Response (P,) of the parameters to a unit of `push`.

    Args:
        gradient (`Callable`): theta (P,) -> gradient (P,) of the training objective.
        theta (`Tensor`): theta_T, (P,).
        push (`Tensor`): (P,) gradient of what is nudged: a row's loss, or a source's, over the supervised tokens.
        steps, step_size, damping: K, eta and lambda; the damping pulls towards theta_T.
        epsilon (`float`): size of the nudge.
        trajectories (`int`): 2 (central difference) or 1 (against theta_T).
    """

    def end(nudge: float) -> Tensor:
        at = theta.clone()
        for _ in range(steps):
            at = at - step_size * (gradient(at) + damping * (at - theta) + nudge * push)
        return at

    if trajectories == 1:
        return (end(epsilon) - theta) / epsilon
    return (end(epsilon) - end(-epsilon)) / (2 * epsilon)


def objective_gradient(
    model: nn.Module, parameters: Parameters, objective: Objective, batches: Sequence[Batch]
) -> Callable[[Tensor], Tensor]:
    """theta -> gradient of the mean loss per supervised token over `batches`, for [`simulate`]; float as the model.

    The model's responding weights are left where the last call put them.
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
    parameters: Parameters,
    objective: Objective,
    batches: Iterable[Batch],
    groups: Tensor,
    *,
    steps: int,
    step_size: float,
    damping: float = 0.0,
    epsilon: float = 1e-3,
    trajectories: int = 2,
) -> Tensor:
    """Responses (groups, P) of a fine-tuned model to rows or sources, by literal simulation; use inside `frozen`.

    Args:
        batches (`Iterable`): all training rows, in order.
        groups (`Tensor`): (groups, rows) of zeros and ones: one line per row, or per source, to be nudged.
    """
    batches = list(batches)
    theta = parameters.read(model)
    rows = PerSampleGradients(model, parameters, objective)
    gradients, tokens = zip(*(rows(batch) for batch in batches), strict=True)
    pushes = groups.to(theta.dtype) @ torch.cat(gradients).to(theta.dtype) / torch.cat(tokens).sum()
    at = objective_gradient(model, parameters, objective, batches)
    settings = dict(steps=steps, step_size=step_size, damping=damping, epsilon=epsilon, trajectories=trajectories)
    try:
        return torch.stack([simulate(at, theta, push, **settings) for push in pushes])  # type: ignore[arg-type]
    finally:
        parameters.write(model, theta)
