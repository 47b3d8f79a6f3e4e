"""One segment of a training run, and how responses pass through it, forwards and backwards.

In coordinates x~ = D^{-1/2} x a segment of length tau carries an earlier response r and adds its own push from row
gradients g (design of Bae et al. 2024, with the optimizer's diagonal D folded in):

    r~  <-  exp(-tau H~) r~  -  phi(H~) D^{1/2} g e / tau .

The adjoint of this map lets an adjoint basis of k vectors walk backwards through all segments once; a row's
coordinates are then plain inner products of its gradients, and no (rows, P) matrix is ever kept.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .curvature import Curvature
from .horizon import Horizon


__all__ = ["Segment", "Visits"]


@dataclass(frozen=True)
class Visits:
    """Rows in the steps of a segment, each with the gradient that its step took.

    Attributes:
        rows (`Tensor`): (n,) row indices.
        captured (`Tensor`): (n,) positions among the captured gradients.
        rates (`Tensor`): (n,) float64: what the step multiplied the gradient with, D aside.
        remaining (`Tensor`): (n,) float64: optimizer time from the step to the segment's end.
    """

    rows: Tensor
    captured: Tensor
    rates: Tensor
    remaining: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Tensor | slice) -> "Visits":
        """Return some of the visits."""
        return Visits(self.rows[chosen], self.captured[chosen], self.rates[chosen], self.remaining[chosen])

    def of(self, row_indices: Tensor) -> tuple["Visits", Tensor]:
        """Return the visits of rows (n,), and which of the n each is of."""
        ordered = self.rows[self._order]
        first = torch.searchsorted(ordered, row_indices)
        counts = torch.searchsorted(ordered, row_indices, right=True) - first
        lines = torch.repeat_interleave(torch.arange(len(row_indices)), counts)
        within = torch.arange(len(lines)) - (counts.cumsum(0) - counts)[lines]
        return self[self._order[first[lines] + within]], lines

    @cached_property
    def _order(self) -> Tensor:
        return torch.argsort(self.rows, stable=True)


@dataclass
class Segment:
    """Consecutive optimizer steps of a run.

    Attributes:
        theta (`Tensor`): (P,) tracked parameters in the middle of the segment.
        diagonal (`Tensor`): (P,) D, by which the optimizer multiplies a gradient.
        horizon (`Horizon`): the filter; its length is tau.
        row_weights (`Tensor`): (rows,) e / tau: the mean weight of a row's summed loss in the objective of these
            steps. Exactly zero for a row that these steps never saw.
        weight_decay (`float`): decoupled decay per unit of learning rate.
        curvature (`Curvature`, *optional*): H~; set by the curvature pass.
        visits (`Visits`, *optional*): rows in the segment's steps, where their gradients were captured.
    """

    theta: Tensor
    diagonal: Tensor
    horizon: Horizon
    row_weights: Tensor
    weight_decay: float = 0.0
    curvature: Curvature | None = None
    visits: Visits | None = None

    def propagate(self, earlier: Tensor | None, pushes: Tensor) -> Tensor:
        """Return the responses after the segment, (n, P).

        Args:
            earlier (`Tensor`, *optional*): (n, P) responses before it; None for the first segment.
            pushes (`Tensor`): (n, P) row gradients at `theta`, already times each row's weight.
        """
        assert self.curvature is not None, "the curvature pass comes first"
        root = self.diagonal.sqrt()
        carried = [] if earlier is None else [(self.horizon.decay, earlier / root)]
        return self.curvature.apply_sum((self._push, pushes * root), *carried).mul_(root)

    def propagate_visits(self, earlier: Tensor, gradients: Tensor, visits: Visits, lines: Tensor) -> Tensor:
        """Return the responses after the segment, (n, P), given what its steps themselves took of the rows.

        A visit pushes by its step's rate times its gradient, and what follows it in the segment lets it decay.

        Args:
            earlier (`Tensor`): (n, P) responses before it.
            gradients (`Tensor`): (visits, P) of the training loss.
            visits (`Visits`): these visits.
            lines (`Tensor`): (visits,) which of the n rows each is of.
        """
        assert self.curvature is not None, "the curvature pass comes first"
        root, remaining = self.diagonal.sqrt(), visits.remaining[:, None]
        pushes = gradients * root * visits.rates.to(gradients.dtype)[:, None].neg()
        pushed = (lambda sigma: torch.exp(-remaining * sigma), pushes, lines)
        return self.curvature.apply_sum((self.horizon.decay, earlier / root), pushed).mul_(root)

    def adjoint(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the adjoint of `propagate` to vectors (n, P).

        Returns:
            on_pushes and on_earlier, both (n, P), with
            <vector, propagate(earlier, push)> = <on_pushes, push> + <on_earlier, earlier>.
        """
        assert self.curvature is not None, "the curvature pass comes first"
        root = self.diagonal.sqrt()
        scaled = vectors * root
        on_pushes = self.curvature.apply(self._push, scaled).mul_(root)
        return on_pushes, self.curvature.apply(self.horizon.decay, scaled).div_(root)

    def _push(self, sigma: Tensor) -> Tensor:
        """Return -phi(sigma): parameters move against the gradient."""
        return -self.horizon.push(sigma)
