"""Optimizer state: the moments of past gradients that an optimizer keeps, in 32, 8 or 4 bits, read as plain tensors.

| optimizer | first moment | second moment |
|---|---|---|
| torch Adam, AdamW (fused too) | `exp_avg` | `exp_avg_sq` |
| torchao, 8 bits, 4 bits, fp8 | `exp_avg`, codes with a scale for each block | `exp_avg_sq`, likewise |
| bitsandbytes, 32 bits | `state1` | `state2` |
| bitsandbytes, 8 bits | `state1`: places in `qmap1`, times `absmax1` of each block | `state2`, likewise |

A second moment whose code is zero lies anywhere below half the smallest code. It is read as half of that, since a step
that divides by zero is none that the optimizer takes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


__all__ = ["AdamMoments", "adam_moments", "has_moments", "is_low_bit"]

_BLOCKS = (256, 2048)  # weights that share a scale in bitsandbytes: today, and before 0.45


class AdamMoments(NamedTuple):
    """Moments of Adam as it keeps them, before the correction for their start at zero, float32 of the weight's shape.

    Attributes:
        first (`Tensor`): moving average of gradients.
        second (`Tensor`): of their squares, or its largest value so far with `amsgrad`.
        steps (`float`): gradients that were averaged.
    """

    first: Tensor
    second: Tensor
    steps: float

    def corrected(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return both moments without the bias of their start at zero."""
        first_beta, second_beta = (float(beta) for beta in group["betas"][:2])
        return self.first / (1.0 - first_beta**self.steps), self.second / (1.0 - second_beta**self.steps)

    def step(self, group: dict[str, Any]) -> Tensor:
        """Return the step per unit of learning rate, before its sign: m / (sqrt(v) + eps)."""
        first, second = self.corrected(group)
        return first / (second.sqrt() + group["eps"])

    def after(self, gradient: Tensor, group: dict[str, Any]) -> "AdamMoments":
        """Return the moments after one more gradient."""
        first_beta, second_beta = (float(beta) for beta in group["betas"][:2])
        first = first_beta * self.first + (1.0 - first_beta) * gradient
        second = second_beta * self.second + (1.0 - second_beta) * gradient.square()
        return AdamMoments(first, second, self.steps + 1.0)


def has_moments(state: dict[str, Any]) -> bool:
    """Return whether a weight has taken a step of Adam, so that its state is there and not all zeros."""
    return ("exp_avg_sq" in state or "state2" in state) and float(state["step"]) > 0


def is_low_bit(state: dict[str, Any]) -> bool:
    """Return whether the moments are kept in fewer bits than the step was computed with."""
    return "absmax2" in state or hasattr(_local(state.get("exp_avg_sq")), "codes")


def adam_moments(state: dict[str, Any], group: dict[str, Any], exact: bool = False) -> AdamMoments:
    """Return the moments in the state of one weight.

    Args:
        state (`dict`): of an optimizer of the table above, after at least one step.
        group (`dict`): its parameter group.
        exact (`bool`): whether second moments whose code is zero stay zero, as the optimizer's next step reads them.
    """
    if "state2" in state:
        first = _from_table(state, "1", exact=True)
        return AdamMoments(first, _from_table(state, "2", exact), float(state["step"]))
    second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    return AdamMoments(_from_codes(state["exp_avg"], exact=True), _from_codes(second, exact), float(state["step"]))


def _from_table(state: dict[str, Any], number: str, exact: bool) -> Tensor:
    """Return a moment of bitsandbytes."""
    codes = state[f"state{number}"]
    if f"absmax{number}" not in state:
        return codes.float()
    table, scales = state[f"qmap{number}"].float(), state[f"absmax{number}"]
    block = next(size for size in _BLOCKS if -(-codes.numel() // size) == len(scales))
    scales = scales.repeat_interleave(block)[: codes.numel()].view(codes.shape)
    value = table[codes.long()] * scales
    return value if exact else torch.where(value == 0, 0.5 * table[table > 0].min() * scales, value)


def _from_codes(moment: Tensor, exact: bool) -> Tensor:
    """Return a moment of torch or torchao; of a shard, a shard."""
    local: Any = _local(moment)
    if not hasattr(local, "codes"):
        return moment.float()
    value = local.dequantize().float()
    if not exact:
        scales = local.scale.float().repeat_interleave(value.numel() // len(local.scale)).view(value.shape)
        value = torch.where(value == 0, 0.5 * _smallest(local) * scales, value)
    if local is moment:
        return value
    shard: Any = moment
    return type(shard).from_local(
        value, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )


def _smallest(moment: Any) -> float:
    """Return the smallest positive value that a code of torchao stands for, before its scale."""
    if hasattr(moment, "qmap"):
        return float(moment.qmap[moment.qmap > 0].min())
    return float(torch.finfo(moment.codes.dtype).smallest_normal * torch.finfo(moment.codes.dtype).eps)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
