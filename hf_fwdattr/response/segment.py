"""One stretch of a training run, and how responses pass through it, forwards and backwards.

In coordinates x~ = D^{-1/2} x a segment of length tau carries an earlier response r and adds its own push from row
gradients g (design of Bae et al. 2024, with the optimizer's diagonal D folded in):

    r~  <-  exp(-tau H~) r~  -  phi(H~) D^{1/2} g e / tau .

The same map read from the right (its adjoint) lets k directions of interest walk backwards through all segments once;
a row's coordinates are then plain inner products of its gradients, and no (rows, P) matrix is ever kept.
"""

from dataclasses import dataclass

from torch import Tensor

from .curvature import Curvature
from .horizon import Horizon


@dataclass
class Segment:
    """What was recorded of a stretch of consecutive optimizer steps.

    Attributes:
        theta (`Tensor`): (P,) responding parameters in the middle of the segment.
        diagonal (`Tensor`): (P,) D, what the optimizer multiplies a gradient with.
        horizon (`Horizon`): the filter; its length is tau.
        share (`Tensor`): (rows,) e / tau: the mean weight of a row's summed loss in the objective of these steps.
            Exactly zero for a row that these steps never saw.
        weight_decay (`float`): decoupled decay per unit of learning rate.
        curvature (`Curvature`, *optional*): set by the curvature pass.
    """

    theta: Tensor
    diagonal: Tensor
    horizon: Horizon
    share: Tensor
    weight_decay: float = 0.0
    curvature: Curvature | None = None

    def propagate(self, earlier: Tensor | None, pushes: Tensor) -> Tensor:
        """Responses after the segment, (n, P).

        Args:
            earlier (`Tensor`, *optional*): (n, P) responses before it; None for the first segment.
            pushes (`Tensor`): (n, P) row gradients at `theta`, already times each row's `share`.
        """
        assert self.curvature is not None, "the curvature pass comes first"
        root = self.diagonal.sqrt()
        moved = [] if earlier is None else [(self.horizon.decay, earlier / root)]
        return self.curvature.apply_sum((self._pushed, pushes * root), *moved).mul_(root)

    def adjoint(self, hidden_state_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint: what (n, P) covectors after the segment see of pushes in it, and of responses before it.

        Returns:
            pull (n, P), with <covector, response> = <pull, share * gradient> + <before, earlier response>; and before.
        """
        assert self.curvature is not None, "the curvature pass comes first"
        root = self.diagonal.sqrt()
        scaled = hidden_state_gradients * root
        pull = self.curvature.apply(self._pushed, scaled).mul_(root)
        return pull, self.curvature.apply(self.horizon.decay, scaled).div_(root)

    def _pushed(self, sigma: Tensor) -> Tensor:
        """What a push becomes: it is against the gradient."""
        return -self.horizon.push(sigma)
