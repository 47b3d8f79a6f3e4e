"""What the real optimizer multiplies a gradient with, read from its own state."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.fsdp import whole
from ..models.parameters import Parameters


# Weight of the share m^2 / v that the second moment takes back of a step, and the least that is left. For a steady
# gradient the derivative says 1; measured against real training (scripts/leave_sources_out.py --ablate), 2 gives the
# better direction and the better calibration, and more changes little.
FEEDBACK = 2.0
_FLOOR = 0.02


@dataclass(frozen=True)
class Preconditioner:
    """The optimizer seen from the responding parameters.

    Attributes:
        kind (`str`): `adamw`, `adam` or `sgd`.
        groups (`tuple[int, ...]`): parameter group of each responding parameter.
        momentum (`float`): of SGD; 0 otherwise. A push lasts 1 / (1 - momentum) steps.
        weight_decay (`float`): per unit of learning rate.
    """

    kind: str
    groups: tuple[int, ...]
    momentum: float
    weight_decay: float

    @classmethod
    def of(cls, optimizer: Any, model: nn.Module, parameters: Parameters) -> "Preconditioner":
        """Read the kind of optimizer and check that the mathematics covers it.

        Raises:
            UnsupportedError: another optimizer than Adam, AdamW or SGD, or options without a closed form.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        kinds: dict[type, str] = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}
        kind = kinds.get(type(optimizer))
        if kind is None:
            raise UnsupportedError(
                f"responses are known for torch's AdamW, Adam and SGD, not for {type(optimizer).__module__}."
                f"{type(optimizer).__name__}; set TrainingArguments(optim='adamw_torch')"
            )
        where = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        groups = []
        for name, parameter in zip(parameters.names, parameters.tensors(model), strict=True):
            if id(parameter) not in where:
                raise UnsupportedError(f"{name} is not trained by the optimizer, so it cannot respond")
            groups.append(where[id(parameter)])
        used = [optimizer.param_groups[index] for index in sorted(set(groups))]
        for option in ("maximize", "nesterov", "dampening"):
            if any(group.get(option) for group in used):
                raise UnsupportedError(f"{type(optimizer).__name__} with {option} has no closed-form response here")
        for option in ("weight_decay", "momentum"):
            if len({group.get(option, 0.0) for group in used}) > 1:
                raise UnsupportedError(
                    f"the responding parameters have different {option}; choose `parameters` from one group"
                )
        decay, momentum = float(used[0].get("weight_decay") or 0.0), float(used[0].get("momentum") or 0.0)
        if kind == "adam" and decay and not used[0].get("decoupled_weight_decay"):
            raise UnsupportedError("Adam with weight_decay has no closed-form response here; use AdamW")
        return cls(kind, tuple(groups), momentum, decay)

    def learning_rate(self, optimizer: Any) -> float:
        """Of the first responding parameter, now; the diagonal carries the others' ratio to it."""
        return float(optimizer.param_groups[self.groups[0]]["lr"])

    @torch.no_grad()
    def diagonal(self, optimizer: Any, model: nn.Module, parameters: Parameters) -> Tensor:
        """D, (P,) on the CPU: what a change of the gradient does to the step, times the group's rate ratio.

        1 for SGD; for Adam and AdamW see [`_adam`]. Collective where the optimizer's state is sharded.

        Raises:
            UnsupportedError: the optimizer has no state for a responding parameter.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        blocks = []
        base = self._rate(optimizer.param_groups[self.groups[0]])
        for index, parameter, name in zip(self.groups, parameters.tensors(model), parameters.names, strict=True):
            group = optimizer.param_groups[index]
            block = torch.ones_like(parameter, dtype=torch.float32)
            if self.kind != "sgd":
                state = optimizer.state.get(parameter, {})
                if "exp_avg_sq" not in state:
                    raise UnsupportedError(f"the optimizer has no second moment for {name}: it never got a gradient")
                block = _adam(state, group)
            blocks.append((whole(block) * (self._rate(group) / base)).reshape(-1).cpu())
        return torch.cat(blocks)

    @staticmethod
    def _rate(group: dict[str, Any]) -> float:
        return float(group.get("initial_lr", group["lr"])) or 1.0


def _adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Derivative of Adam's step m / (sqrt(v) + eps) by a lasting change of the gradient, elementwise, positive.

    The numerator alone gives 1 / (sqrt(v) + eps). But the change also enters v, by twice the gradient, and so takes a
    share m^2 / v of the step back: where every batch pulls the same way, Adam's step hardly depends on how hard.
    """
    count = float(state["step"])
    first = state["exp_avg"].float() / (1.0 - group["betas"][0] ** count)
    second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].float()
    second = second / (1.0 - group["betas"][1] ** count)
    steady = first.square() / second.clamp(min=torch.finfo(torch.float32).tiny)
    return (1.0 - FEEDBACK * steady).clamp(min=_FLOOR) / (second.sqrt() + group["eps"])
