"""Horizons: spectral filters that say how far a push travels in training.

With sigma an eigenvalue of the preconditioned Gauss-Newton matrix and tau the length of training in optimizer time, a
push that acts all through a segment ends as phi(sigma) = (1 - exp(-tau sigma)) / sigma, and an earlier response
shrinks by exp(-tau sigma) (Bae et al. 2024, "Training Data Attribution via Approximate Unrolled Differentiation", in
continuous time). The paper's K explicit steps of size eta (arXiv 2511.19803) are the same with (1 - eta sigma)^K in
place of the exponential, and K = infinity is the damped inverse. For tau = 2:

    sigma     0     0.01    1       100
    push      2     1.980   0.865   0.01     (short of 1/sigma where training was too short to settle)
    decay     1     0.980   0.135   0
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError, UnsupportedError


__all__ = ["ExplicitHorizon", "Horizon", "NaturalHorizon"]


@dataclass(frozen=True)
class NaturalHorizon:
    """The run's own length as the horizon, without anything to tune.

    Attributes:
        tau (`float`): sum of the segment's learning rates (divided by 1 - momentum for SGD).
    """

    tau: float

    @property
    def length(self) -> float:
        """Value of the push filter at sigma = 0."""
        return self.tau

    def push(self, sigma: Tensor) -> Tensor:
        """Return phi(sigma), of the same shape; tau where sigma is zero."""
        x = self.tau * sigma
        return torch.where(x.abs() < 1e-12, self.tau, -torch.expm1(-x) / torch.where(sigma == 0, 1.0, sigma))

    def decay(self, sigma: Tensor) -> Tensor:
        """Return exp(-tau sigma), of the same shape."""
        return torch.exp(-self.tau * sigma)


@dataclass(frozen=True)
class ExplicitHorizon:
    """The paper's form: K gradient steps of size eta with damping lambda.

    Attributes:
        steps (`float`): K; `math.inf` gives the damped inverse 1 / (sigma + lambda).
        step_size (`float`): eta; eta * (sigma + lambda) must stay below 2, or the simulation would diverge.
        damping (`float`): lambda, added to sigma.
    """

    steps: float
    step_size: float = 1.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        whole = math.isinf(self.steps) or float(self.steps).is_integer()
        if not (whole and self.steps >= 1 and self.step_size > 0 and self.damping >= 0):
            raise UnsupportedError(
                f"horizon: steps={self.steps}, step_size={self.step_size}, damping={self.damping}. Steps must be a "
                "whole number from 1 on (or infinite), the step size positive and the damping not negative"
            )

    @property
    def length(self) -> float:
        """Value eta K of the push filter at sigma = 0 without damping."""
        return self.step_size * self.steps

    def push(self, sigma: Tensor) -> Tensor:
        """Return (1 - (1 - eta s)^K) / s with s = sigma + lambda; eta K where s is zero."""
        damped = self._damped(sigma)
        if math.isinf(self.steps):
            return 1.0 / damped
        x = self.step_size * damped
        # The second form keeps its digits where x is small; the first holds where 1 - x is negative.
        reached = torch.where(
            x > 0.5, 1.0 - self.decay(sigma), -torch.expm1(self.steps * torch.log1p(-x.clamp(max=0.5)))
        )
        return torch.where(x.abs() < 1e-300, self.length, reached / torch.where(x == 0, 1.0, damped))

    def decay(self, sigma: Tensor) -> Tensor:
        """Return (1 - eta s)^K."""
        if math.isinf(self.steps):
            return torch.zeros_like(sigma)
        return (1.0 - self.step_size * self._damped(sigma)) ** self.steps

    def _damped(self, sigma: Tensor) -> Tensor:
        """Return s = sigma + lambda.

        Raises:
            NumericalError: the simulation would not converge.
        """
        damped = sigma + self.damping
        if math.isinf(self.steps):
            if bool((damped <= 0).any()):
                raise NumericalError(
                    "steps=inf: infinitely many steps do not converge where curvature is zero. Set damping above zero"
                )
        elif bool((self.step_size * damped > 2).any()):
            raise NumericalError(
                f"step_size={self.step_size:g}: the simulation diverges at curvature {float(damped.max()):.3g}. "
                f"The step size must stay below {2 / float(damped.max()):.3g}"
            )
        return damped


Horizon = NaturalHorizon | ExplicitHorizon
