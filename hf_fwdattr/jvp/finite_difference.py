"""Readout by differences: two forward passes per direction and step size, for whatever can only run forwards.

For engines without forward-mode derivatives, quantised bases, or another process that serves log-likelihoods. The step
is chosen on the first directions, every derivative is taken at a step and at half of it, and digits on which the two
disagree are not reported: bf16 weights, for one, cannot resolve small steps at all.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import NumericalError, UnsupportedError
from ..models.compat import refuse_inactive_adapters
from ..models.likelihood import Batch, Likelihood, Objective, log_probabilities
from ..models.parameters import Parameters


_LADDER = [4.0**-i for i in range(9)]  # steps tried, relative to the longest
_LONGEST = 0.5  # of the parameters' own norm


@torch.no_grad()
def read(
    model: nn.Module,
    parameters: Parameters,
    objective: Objective,
    batch: Batch,
    directions: Tensor,
    chunk: int | None = None,
    step: float | None = None,
    sides: int = 2,
    tolerance: float = 0.02,
) -> Tensor:
    """Directional derivatives of the log-likelihood of a batch of queries; same result as `jvp.read`.

    Args:
        model, parameters, objective, batch, directions: as in `jvp.read`.
        chunk: ignored; directions are read one after the other.
        step (`float`, *optional*): h in units of the directions' coordinates; chosen from the arithmetic by default.
        sides (`int`): 2 for central differences, 1 for differences against the unperturbed pass.
        tolerance (`float`): largest disagreement of a step and its half, relative to the derivatives' norm.

    Returns:
        (queries, positions, k), zero where a position is not supervised.

    Raises:
        NumericalError: the arithmetic does not have the digits; the message says what was reached.
        UnsupportedError: the model is in training mode.
    """
    if any(module.training for module in model.modules()):
        raise UnsupportedError("the model is in training mode, where dropout is random; call model.eval()")
    refuse_inactive_adapters(model, parameters.live)
    likelihood = Likelihood(model, objective)
    weights = dict(zip(parameters.live, (p.detach() for p in parameters.tensors(model)), strict=True))
    centre = _log_likelihood(likelihood, weights, batch) if sides == 1 else None

    def slope(direction: Tensor, h: float) -> Tensor:
        moved = []
        for side in (h, -h)[:sides]:
            pieces = zip(parameters.live, parameters.split(direction), strict=True)
            moved.append(
                _log_likelihood(
                    likelihood, {n: weights[n] + (side * u).to(weights[n].dtype) for n, u in pieces}, batch
                )
            )
        return (moved[0] - (moved[1] if centre is None else centre)) / (h * sides)

    norm = torch.cat([weight.reshape(-1).float() for weight in weights.values()]).norm()
    longest = _LONGEST * float(norm / directions.float().norm(dim=1).mean().clamp(min=1e-30)) or 1.0
    if step is None:
        step = _best_step(slope, directions, [longest * factor for factor in _LADDER])
    columns, squares, errors = [], 0.0, 0.0
    for direction in directions:
        long, short = slope(direction, step), slope(direction, step / 2)
        # Richardson: the error of a central difference falls fourfold with half the step, of a one-sided one twofold.
        columns.append((4 * short - long) / 3 if sides == 2 else 2 * short - long)
        squares += float(short.square().sum())
        errors += float((short - long).square().sum())
    reached = (errors / max(squares, 1e-300)) ** 0.5
    if not reached <= tolerance:
        raise NumericalError(
            f"finite differences in {next(iter(weights.values())).dtype} disagree by {reached:.1%} between a step and "
            f"its half (allowed: {tolerance:.1%}); load the model in float32, or use readout='jvp'"
        )
    return torch.stack(columns, dim=-1).to(directions.dtype)


def _best_step(slope, directions: Tensor, steps: list[float]) -> float:  # type: ignore[no-untyped-def]
    """The step at which two directions' slopes change least when it is halved."""
    chosen = directions[directions.abs().sum(1) > 0][:2]
    if len(chosen) == 0:
        return steps[0]
    slopes = [torch.stack([slope(direction, h) for direction in chosen]) for h in steps]
    changes = [
        float((fine - coarse).norm()) if bool(torch.isfinite(coarse).all()) else float("inf")
        for coarse, fine in pairwise(slopes)
    ]
    # Steps that are lost in rounding change nothing at all; a real slope is never exactly zero everywhere.
    usable = [change if bool(fine.any()) else float("inf") for change, fine in zip(changes, slopes[1:], strict=True)]
    return steps[min(range(len(usable)), key=usable.__getitem__)]


def _log_likelihood(likelihood: Likelihood, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """(queries, positions) in float64, so that the difference of two sums loses nothing more than the logits did."""
    logits, labels = likelihood.at(weights, batch)
    return log_probabilities(logits.double(), labels)
