"""Directional derivatives by differences: a few forward passes per direction, for models that can only run forwards.

Meant for engines without forward-mode derivatives, quantised bases, or another process that serves log-likelihoods.
The step is chosen on the first directions, every derivative is taken at a step and at half of it, and digits on which
the two disagree are not reported: bfloat16 weights, for one, cannot resolve small steps at all.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import NumericalError, UnsupportedError
from ..models.compat import refuse_inactive_adapters
from ..models.likelihood import Batch, Likelihood, Objective, log_probabilities
from ..models.parameters import TrackedParameters


__all__ = ["FiniteDifferenceJVP"]

_LADDER = [4.0**-i for i in range(9)]  # candidate steps, relative to the longest
_SHORTER = (1 / 4, 1 / 16, 1 / 64)  # steps for a direction whose slopes disagree, relative to that of all
_LONGEST = 0.5  # longest step, relative to the norm of the parameters
Slope = Callable[[Tensor, float], Tensor]  # direction (P,), step -> (queries, positions)


class FiniteDifferenceJVP:
    """A batch of queries, prepared for derivatives of its log-likelihood by finite differences.

    Args:
        model, parameters, objective, batch: as for `AnalyticJVP`.
        step (`float`, *optional*): h in units of the directions' coordinates; chosen from the arithmetic by default.
        sides (`int`): 2 for central differences, 1 for differences against the unperturbed pass.
        tolerance (`float`): largest disagreement of a step and its half, relative to the derivatives' norm.

    Raises:
        UnsupportedError: the model is in training mode.
    """

    def __init__(
        self, model: nn.Module, parameters: TrackedParameters, objective: Objective, batch: Batch,
        step: float | None = None, sides: int = 2, tolerance: float = 0.02,
    ):  # fmt: skip
        if any(module.training for module in model.modules()):
            raise UnsupportedError("the model is in training mode, where dropout is random; call model.eval()")
        refuse_inactive_adapters(model, parameters.live)
        self._model, self._parameters, self._batch = model, parameters, batch
        self._likelihood = Likelihood(model, objective)
        self._step, self._sides, self._tolerance = step, sides, tolerance

    @torch.no_grad()
    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate each token's log-likelihood along directions (k, P).

        Args:
            chunk: ignored; directions are taken one after the other.

        Returns:
            (queries, positions, k), zero where a position is not supervised; in the directions' dtype.

        Raises:
            NumericalError: the arithmetic does not have the digits; the message says how many were reached.
        """
        tensors = self._parameters.tensors(self._model)
        weights = dict(zip(self._parameters.live, (tensor.detach() for tensor in tensors), strict=True))
        centre = self._log_likelihood(weights) if self._sides == 1 else None

        def slope(direction: Tensor, step: float) -> Tensor:
            pieces = dict(zip(weights, self._parameters.split(direction), strict=True))
            values = [
                self._log_likelihood({n: w + (side * pieces[n]).to(w.dtype) for n, w in weights.items()})
                for side in (step, -step)[: self._sides]
            ]
            return (values[0] - (values[1] if centre is None else centre)) / (step * self._sides)

        step = self._step
        if step is None:
            norm = torch.cat([weight.reshape(-1).float() for weight in weights.values()]).norm()
            longest = _LONGEST * float(norm / directions.float().norm(dim=1).mean().clamp(min=1e-30)) or 1.0
            step = _best_step(slope, directions, [longest * factor for factor in _LADDER])
        columns, squares, errors = [], 0.0, 0.0
        for direction in directions:
            long, short = self._slopes(slope, direction, step)
            # Richardson: half the step has a fourth of a central difference's error, and half of a one-sided one's.
            columns.append((4 * short - long) / 3 if self._sides == 2 else 2 * short - long)
            squares += float(short.square().sum())
            errors += float((short - long).square().sum())
        disagreement = (errors / max(squares, 1e-300)) ** 0.5
        if not disagreement <= self._tolerance:
            raise NumericalError(
                f"finite differences in {tensors[0].dtype} disagree by {disagreement:.1%} between a step and its half "
                f"(allowed: {self._tolerance:.1%}); load the model in float32, or use readout='jvp'"
            )
        return torch.stack(columns, dim=-1).to(directions.dtype)

    def _slopes(self, slope: Slope, direction: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Return the slopes at a step and at its half; at shorter ones where these disagree, as across a jump.

        A mixture of experts jumps where a token changes its expert.
        """
        best: tuple[Tensor, Tensor] | None = None
        least = float("inf")
        for length in (step, *(step * factor for factor in _SHORTER)):
            long, short = slope(direction, length), slope(direction, length / 2)
            change, size = float((short - long).norm()), float(short.norm())
            if best is None or change < least * size:
                best, least = (long, short), change / size if size else 0.0
            if not least > self._tolerance:
                break
        assert best is not None
        return best

    def _log_likelihood(self, weights: dict[str, Tensor]) -> Tensor:
        """Return (queries, positions) in float64, so that a difference loses no more than the logits have lost."""
        logits, labels = self._likelihood.at(weights, self._batch)
        return log_probabilities(logits.double(), labels)


def _best_step(slope: Slope, directions: Tensor, steps: Sequence[float]) -> float:
    """Return the step at which two directions' slopes change least when it is halved."""
    chosen = directions[directions.abs().sum(1) > 0][:2]
    if len(chosen) == 0:
        return steps[0]
    slopes = [torch.stack([slope(direction, step) for direction in chosen]) for step in steps]
    changes = [
        float((fine - coarse).norm()) if bool(torch.isfinite(coarse).all()) else float("inf")
        for coarse, fine in pairwise(slopes)
    ]
    # Steps that are lost in rounding change nothing at all; a real slope is never exactly zero everywhere.
    usable = [change if bool(fine.any()) else float("inf") for change, fine in zip(changes, slopes[1:], strict=True)]
    return steps[min(range(len(usable)), key=usable.__getitem__)]
