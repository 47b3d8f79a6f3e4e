import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.response.horizon import ExplicitHorizon, Horizon, NaturalHorizon
from tests.helpers.reference import agree


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    curvature=st.floats(1e-18, 1.99) | st.just(0.0),
    share_of_damping=st.floats(0, 1),
    step_size=st.floats(1e-3, 10),
    steps=st.integers(1, 60),
)
def test_explicit_horizon_equals_simulated_descent(
    curvature: float, share_of_damping: float, step_size: float, steps: int
) -> None:
    sigma = curvature / step_size * (1 - share_of_damping)
    damping = curvature / step_size * share_of_damping
    pushed, carried = 0.0, 1.0
    for _ in range(steps):
        pushed -= step_size * ((sigma + damping) * pushed - 1.0)
        carried -= step_size * (sigma + damping) * carried
    horizon = ExplicitHorizon(steps, step_size, damping)
    assert horizon.push(scalar(sigma)).item() == pytest.approx(pushed, rel=1e-8, abs=1e-12)
    assert horizon.decay(scalar(sigma)).item() == pytest.approx(carried, rel=1e-8, abs=1e-12)


def test_natural_horizon_has_the_documented_values() -> None:
    horizon = NaturalHorizon(2.0)
    sigma = torch.tensor([0.0, 0.01, 1.0, 100.0], dtype=torch.float64)
    agree(horizon.push(sigma), torch.tensor([2.0, 1.98013, 0.864665, 0.01]), 1e-5)
    agree(horizon.decay(sigma), torch.tensor([1.0, 0.980199, 0.135335, 0.0]), 1e-5)


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-13, 1e-9, 1e-3, 2.0, 1e6])
@pytest.mark.parametrize("tau", [1e-6, 0.3, 40.0])
def test_natural_horizon_keeps_its_digits_at_small_curvature(sigma: float, tau: float) -> None:
    """Power series of (1 - exp(-x)) / x where x is small, the plain formula where it is not."""
    x = tau * sigma
    expected = tau * (1 - x / 2 + x**2 / 6) if x < 1e-5 else (1 - math.exp(-x)) / sigma
    assert NaturalHorizon(tau).push(scalar(sigma)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("horizon", [NaturalHorizon(3.0), ExplicitHorizon(7, 0.2), ExplicitHorizon(math.inf, 1.0)])
def test_push_and_decay_complement_each_other(horizon: Horizon) -> None:
    """A response approaches its limit exactly as far as earlier ones are forgotten: sigma * push + decay = 1."""
    sigma = torch.logspace(-8, 0.9, 50, dtype=torch.float64)
    agree(sigma * horizon.push(sigma) + horizon.decay(sigma), torch.ones(50), 1e-12)


@pytest.mark.parametrize("horizon", [NaturalHorizon(3.0), ExplicitHorizon(7, 0.2)])
def test_push_equals_length_at_zero_curvature(horizon: Horizon) -> None:
    assert horizon.push(scalar(0.0)).item() == horizon.length
    assert horizon.decay(scalar(0.0)).item() == 1.0


def test_one_explicit_step_is_the_gradient_dot_product() -> None:
    agree(ExplicitHorizon(1, 0.3, 0.5).push(torch.rand(9).double()), torch.full((9,), 0.3, dtype=torch.float64), 1e-12)


def test_explicit_horizon_converges_to_the_damped_inverse() -> None:
    sigma = torch.logspace(-3, 0, 20, dtype=torch.float64)
    agree(ExplicitHorizon(math.inf, 1.0, 0.1).push(sigma), 1.0 / (sigma + 0.1), 1e-12)
    agree(ExplicitHorizon(5000, 0.5, 0.1).push(sigma), 1.0 / (sigma + 0.1), 1e-9)
    assert not ExplicitHorizon(math.inf, 1.0, 0.1).decay(sigma).any()


def test_diverging_steps_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"must stay below 0\.5"):
        ExplicitHorizon(10, 1.0).push(scalar(4.0))


@pytest.mark.parametrize("settings", [(0, 1.0, 0.0), (2.5, 1.0, 0.0), (3, -1.0, 0.0), (3, 1.0, -0.1), (math.nan,)])
def test_invalid_explicit_horizons_are_refused(settings: tuple[float, ...]) -> None:
    with pytest.raises(UnsupportedError, match="whole number"):
        ExplicitHorizon(*settings)


def test_infinite_steps_without_damping_are_refused() -> None:
    with pytest.raises(NumericalError, match="damping above zero"):
        ExplicitHorizon(math.inf).push(scalar(0.0))
