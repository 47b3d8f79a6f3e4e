"""The optimizer's preconditioner: the factor of each gradient component in a step, read from the optimizer's state."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.fsdp import full_tensor
from ..models.names import canonical_name, is_lora_weight
from ..models.parameters import TrackedParameters, is_linear


__all__ = ["FEEDBACK", "Preconditioner", "adam_diagonal", "warn_of_untracked"]

logger = logging.getLogger(__name__)

# Weight of the share m^2 / v of a step that the second moment takes back, and the least that is left of the step. The
# derivative for a steady gradient is 1; measured against real training (leaving sources out), 2 gives the better
# direction and the better calibration, and more changes little.
FEEDBACK = 2.0
_FLOOR = 0.02
_STILL = 1e-12  # diagonal of a weight that does not move: not zero, as responses are scaled by its root
_KINDS: dict[type, str] = {torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd"}


@dataclass(frozen=True)
class Preconditioner:
    """An optimizer as the tracked parameters see it.

    Attributes:
        kind (`str`): `adamw`, `adam` or `sgd`.
        groups (`tuple[int, ...]`): parameter group of each tracked parameter.
        momentum (`float`): of SGD; 0 otherwise. A push lasts 1 / (1 - momentum) steps.
        weight_decay (`float`): per unit of learning rate.
    """

    kind: str
    groups: tuple[int, ...]
    momentum: float
    weight_decay: float

    @classmethod
    def of(cls, optimizer: Any, model: nn.Module, parameters: TrackedParameters) -> "Preconditioner":
        """Read the kind of optimizer and check that the mathematics covers it.

        Raises:
            UnsupportedError: another optimizer than Adam, AdamW or SGD, or options without a closed form.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        name, kind = type(optimizer).__name__, _KINDS.get(type(optimizer))
        if kind is None:
            raise UnsupportedError(
                f"optimizer: {type(optimizer).__module__}.{name}. Responses are known for torch's AdamW, Adam and "
                "SGD. Set TrainingArguments(optim='adamw_torch')"
            )
        group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        groups = []
        for parameter_name, parameter in zip(parameters.names, parameters.tensors(model), strict=True):
            if id(parameter) not in group_of:
                raise UnsupportedError(
                    f"{parameter_name}: it is not trained by the optimizer, so it has no response. Give it to the "
                    "optimizer, or name other weights in ResponseConfig(parameters=...)"
                )
            groups.append(group_of[id(parameter)])
        used = [optimizer.param_groups[index] for index in sorted(set(groups))]
        for option in ("maximize", "nesterov", "dampening"):
            for value in (group[option] for group in used if group.get(option)):
                raise UnsupportedError(
                    f"{option}={value} of {name}: no closed form says how such steps hand on a row's share. Leave it "
                    "at its default"
                )
        of_weights = [optimizer.param_groups[index] for index in groups]
        _refuse_different_options(model, parameters, of_weights)
        decay, momentum = float(used[0].get("weight_decay") or 0.0), float(used[0].get("momentum") or 0.0)
        if kind == "adam" and decay and not used[0].get("decoupled_weight_decay"):
            raise UnsupportedError(
                f"weight_decay={decay:g} of Adam: it is divided by the second moment like a gradient, and no response "
                "knows that. Use AdamW, or weight_decay=0"
            )
        return cls(kind, tuple(groups), momentum, decay)

    def learning_rate(self, optimizer: Any) -> float:
        """Return the learning rate of the first tracked parameter; the diagonal holds the others' ratio to it."""
        return float(optimizer.param_groups[self.groups[0]]["lr"])

    @torch.no_grad()
    def diagonal(self, optimizer: Any, model: nn.Module, parameters: TrackedParameters) -> Tensor:
        """Return D, (P,) on the CPU: the derivative of the step by the gradient, times the group's rate ratio.

        1 for SGD; for Adam and AdamW see [`adam_diagonal`]; next to nothing for a weight that is frozen or never got a
        gradient, whose response is zero. Collective where the optimizer's state is sharded.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        blocks = []
        base = self._rate(optimizer.param_groups[self.groups[0]])
        for index, parameter in zip(self.groups, parameters.tensors(model), strict=True):
            group = optimizer.param_groups[index]
            block = torch.ones_like(parameter, dtype=torch.float32)
            state = optimizer.state.get(parameter, {})
            if not parameter.requires_grad or (self.kind != "sgd" and "exp_avg_sq" not in state):
                block = block * _STILL
            elif self.kind != "sgd":
                block = adam_diagonal(state, group)
            blocks.append((full_tensor(block) * (self._rate(group) / base)).reshape(-1).cpu())
        return torch.cat(blocks)

    @staticmethod
    def _rate(group: dict[str, Any]) -> float:
        return float(group.get("initial_lr", group["lr"])) or 1.0


def _refuse_different_options(model: nn.Module, parameters: TrackedParameters, groups: list[dict[str, Any]]) -> None:
    """Refuse tracked weights whose parameter groups, one for each weight, differ where a bank knows one value.

    Raises:
        UnsupportedError: in weight decay or momentum; the cure keeps what can be tracked.
    """
    for option in ("weight_decay", "momentum"):
        values = [float(group.get(option) or 0.0) for group in groups]
        other = next((index for index, value in enumerate(values) if value != values[0]), None)
        if other is None:
            continue
        linear = {
            value for name, value in zip(parameters.live, values, strict=True)
            if is_linear(model.get_submodule(name.rpartition(".")[0])) and name.endswith(".weight")
        }  # fmt: skip
        cure = f"Use {option}=0, or one value for all"
        if option == "weight_decay" and len(linear) == 1:  # Trainer gives norms and biases none
            cure = "Use parameters='linear', or weight_decay=0"
        raise UnsupportedError(
            f"{option}: {values[0]:g} of {parameters.names[0]} and {values[other]:g} of {parameters.names[other]}. A "
            f"bank knows one value for all tracked weights. {cure}"
        )


def warn_of_untracked(optimizer: Any, model: nn.Module, parameters: TrackedParameters) -> None:
    """Warn of trained matrices that are not tracked, LoRA's A aside: what rows did through them is in no score."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    names = [
        name for name, weight in model.named_parameters()
        if id(weight) in trained and weight.requires_grad and weight.ndim > 1
        and name not in parameters.live and not is_lora_weight(canonical_name(name))
    ]  # fmt: skip
    if names:
        shown = ", ".join(canonical_name(name) for name in names[:3]) + ", ..." * (len(names) > 3)
        logger.warning(
            "parameters='auto' leaves out %d trained matrices: %s. What rows did through them is in no score. Set "
            "parameters='trainable' to track all that is trained",
            len(names), shown,
        )  # fmt: skip


def adam_diagonal(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return the derivative of Adam's step m / (sqrt(v) + eps) by a lasting change of the gradient, elementwise.

    The numerator alone gives 1 / (sqrt(v) + eps). But the change also enters v, by twice the gradient, and so takes a
    share m^2 / v of the step back: where all batches have the same gradient, Adam's step hardly depends on its size.
    """
    count = float(state["step"])
    first = state["exp_avg"].float() / (1.0 - group["betas"][0] ** count)
    second = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].float()
    second = second / (1.0 - group["betas"][1] ** count)
    steady = first.square() / second.clamp(min=torch.finfo(torch.float32).tiny)
    return (1.0 - FEEDBACK * steady).clamp(min=_FLOOR) / (second.sqrt() + group["eps"])
