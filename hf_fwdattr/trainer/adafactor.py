"""Adafactor (Shazeer & Stern 2018): what its step multiplies a gradient with.

    step = rate * g / sqrt(V) / max(1, rms(g / sqrt(V)) / threshold),   V = R C' / mean(R)

R and C are moving averages of the squared gradient's means over columns and over rows; a vector has V itself. There is
no first moment, so a push lasts one step. That V and the clipping of the update depend on the gradient is left out of
the derivative, as it is for the clipping of gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError


__all__ = ["UpdateClipping", "clipping_factor", "inverse_root", "refuse_options"]

_KEPT = 0.9  # share that a step leaves of the average over steps of the factor by which updates are clipped


def refuse_options(group: dict[str, Any]) -> None:
    """Refuse the settings with which Adafactor has no rate of its own.

    Raises:
        UnsupportedError: relative steps, or steps in proportion to the weights.
    """
    for option in ("relative_step", "scale_parameter"):
        if group[option]:
            raise UnsupportedError(
                f"{option}=True of Adafactor: its rate depends on the step or on the weights themselves, and no "
                "schedule says it. Use scale_parameter=False, relative_step=False, as "
                "TrainingArguments(optim='adafactor') does"
            )


def inverse_root(state: dict[str, Any]) -> Tensor:
    """Return 1 / sqrt(V) of one weight, float32 of its shape."""
    if "exp_avg_sq" in state:
        return state["exp_avg_sq"].float().rsqrt()
    rows, columns = state["exp_avg_sq_row"].float(), state["exp_avg_sq_col"].float()
    rows = (rows / rows.mean(-1, keepdim=True)).rsqrt()
    return rows.unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)


def clipping_factor(gradient: Tensor, root: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the factor of a step that the clipping of its update leaves, at most 1, without waiting for the device.

    Args:
        gradient (`Tensor`): of the step.
        root (`Tensor`): see [`inverse_root`], after the step.
        group (`dict`): the parameter group, with the threshold of the update's root mean square.
    """
    size = (gradient.float() * root).square().mean().sqrt()
    return (group["clip_threshold"] / size.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)


class UpdateClipping:
    """Record of the factors by which Adafactor clipped its updates, averaged over about the last ten steps.

    The optimizer does not keep them, so each step costs one more pass over the tracked weights. A run that is
    resumed begins a new average.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, float]] = {}

    @torch.no_grad()
    def record(self, weight: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Record the step that was just taken, while the weight still has its gradient."""
        if weight.grad is None or "step" not in state:
            return
        factor = clipping_factor(weight.grad, inverse_root(state), group)
        total, count = self._sums.get(id(weight), (torch.zeros_like(factor), 0.0))
        self._sums[id(weight)] = _KEPT * total + factor, _KEPT * count + 1.0

    def factor(self, weight: nn.Parameter) -> Tensor | float:
        """Return the average factor of a weight; 1 before a step was recorded."""
        total, count = self._sums.get(id(weight), (1.0, 1.0))
        return total / count
