"""The diagonal of the preconditioner is the derivative of the optimizer's own step."""

import pytest
import torch

from hf_fwdattr.trainer import optimizer
from tests.helpers.reference import agree


def _state(steps: int, mean: float) -> tuple[dict, dict]:
    """State of a real AdamW after gradients `mean` + noise, and its parameter group."""
    parameter = torch.nn.Parameter(torch.zeros(50))
    adam = torch.optim.AdamW([parameter], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        parameter.grad = mean + torch.randn(50, generator=generator)
        adam.step()
    return adam.state[parameter], adam.param_groups[0]


@pytest.mark.parametrize("feedback", [0.0, 1.0])
def test_adam_diagonal_is_the_derivative_of_its_step(feedback: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "FEEDBACK", feedback)
    state, group = _state(steps=400, mean=0.3)
    count = float(state["step"])
    first = (state["exp_avg"] / (1 - group["betas"][0] ** count)).double()
    second = (state["exp_avg_sq"] / (1 - group["betas"][1] ** count)).double()

    def step(change: float) -> torch.Tensor:
        # A lasting change c of the gradient adds c to its mean and 2 m c to its mean square.
        return (first + change) / ((second + feedback * 2 * first * change).sqrt() + group["eps"])

    slope = (step(1e-5) - step(-1e-5)) / 2e-5
    agree(optimizer.adam_diagonal(state, group).double(), slope, 1e-4)


def test_constant_gradient_leaves_almost_no_response() -> None:
    state, group = _state(steps=400, mean=1000.0)
    plain = 1.0 / state["exp_avg_sq"].sqrt()
    assert (optimizer.adam_diagonal(state, group) < 0.1 * plain).all()
    assert (optimizer.adam_diagonal(state, group) > 0).all()
