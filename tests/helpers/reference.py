"""Slow definitions, as close to the formulas as can be, and the comparator that all tests use."""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_fwdattr.models.likelihood import IGNORED, Batch, Objective
from hf_fwdattr.models.parameters import TrackedParameters


def agree(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Fail unless two tensors have one shape and differ by at most `tolerance`, relative to the norm of `expected`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    difference = float((actual.double() - expected.double()).norm())
    scale = float(expected.double().norm())
    assert scale > 0, "nothing to compare with: the expected values are all zero"
    assert difference <= tolerance * scale, f"differs by {difference / scale:.2e}, more than {tolerance:.0e}"


def row_gradient(
    model: nn.Module, parameters: TrackedParameters, objective: Objective, batch: Batch, weights: Tensor | None = None
) -> Tensor:
    """(P,) of the summed cross entropy of a batch, here of one row, by plain autograd and torch's own loss."""
    live = parameters.tensors(model)
    flags = [parameter.requires_grad for parameter in live]
    with sdpa_kernel(SDPBackend.MATH):
        for parameter in live:
            parameter.requires_grad_(True)
        logits, labels = objective.forward(model, batch)
        losses = nn.functional.cross_entropy(
            logits.double().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        ).sum(1)
        total = losses.sum() if weights is None else losses @ weights
        gradients = torch.autograd.grad(total, live, allow_unused=True)
        for parameter, flag in zip(live, flags, strict=True):
            parameter.requires_grad_(flag)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(live, gradients, strict=True)]
    )


def exact_fisher(model: nn.Module, parameters: TrackedParameters, objective: Objective, batch: Batch) -> Tensor:
    """(P, P): mean over supervised positions of sum_c p_c grad(log p_c) grad(log p_c)^T."""
    weights = {name: model.get_parameter(name).detach() for name in parameters.live}

    def log_p(values: dict[str, Tensor]) -> Tensor:
        class Module(nn.Module):
            def forward(self, batch: Batch) -> Tensor:
                return objective.forward(lambda x: functional_call(model, values, (x,)), batch)[0]  # type: ignore[arg-type]

        return Module()(batch).log_softmax(-1)

    blocks = jacrev(log_p)(weights)
    values = log_p(weights)
    jacobian = torch.cat([blocks[name].flatten(values.ndim) for name in parameters.live], dim=-1)
    kept = objective.forward(model, batch)[1] != IGNORED
    rows, p = jacobian[kept], values[kept].exp()
    return torch.einsum("tcp,tc,tcq->pq", rows, p, rows) / len(rows)


def function_of(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """f(H) of a symmetric matrix, dense."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T


def flow(matrix: Tensor, push: Tensor, start: Tensor, tau: float) -> Tensor:
    """x(tau) of dx/dt = -H x - push, x(0) = start, from one matrix exponential; for rows of `push` and `start`."""
    size = len(matrix)
    ends = []
    for one, begin in zip(push, start, strict=True):
        system = np.zeros((size + 1, size + 1))
        system[:size, :size], system[:size, size] = -matrix.numpy(), -one.numpy()
        ends.append(scipy.linalg.expm(tau * system)[:size] @ np.append(begin.numpy(), 1.0))
    return torch.from_numpy(np.array(ends))


def retrained(train: Callable[[Tensor], Tensor], weights: Tensor, row: int, nudge: float) -> Tensor:
    """dtheta_T/dw_row by central difference of two real trainings; `train` maps row weights to final parameters."""
    step = torch.zeros_like(weights)
    step[row] = nudge
    return (train(weights + step) - train(weights - step)) / (2 * nudge)
