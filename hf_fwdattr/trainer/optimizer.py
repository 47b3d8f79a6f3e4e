"""The optimizer's preconditioner: the factor of each gradient component in a step, read from the optimizer's state."""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from ..errors import UnsupportedError
from ..models.fsdp import full_tensor
from ..models.names import canonical_name, is_lora_weight
from ..models.parameters import TrackedParameters, is_linear
from .adafactor import UpdateClipping, inverse_root, refuse_options
from .optimizer_state import adam_moments, has_moments


__all__ = ["FEEDBACK", "Preconditioner", "adam_diagonal", "skips_step", "warn_of_untracked"]

logger = logging.getLogger(__name__)

# Weight of the share m^2 / v of a step that the second moment takes back, and the least that is left of the step. The
# derivative for a steady gradient is 1; measured against real training (leaving sources out), 2 gives the better
# direction and the better calibration, and more changes little.
FEEDBACK = 2.0
_FLOOR = 0.02
_WITHOUT_GRADIENT = 1e14  # 1 / sqrt(V) of Adafactor where V holds nothing but its eps of 1e-30
_STILL = 1e-12  # diagonal of a weight that does not move: not zero, as responses are scaled by its root
_KINDS: dict[type, str] = {
    torch.optim.AdamW: "adamw", torch.optim.Adam: "adam", torch.optim.SGD: "sgd", Adafactor: "adafactor",
}  # fmt: skip
# Classes of other libraries are known by name, so that neither library is imported.
_TORCHAO = re.compile(r"(Adam|AdamW)(8bit|4bit|Fp8)")
_BITSANDBYTES = re.compile(r"(Paged)?AdamW?(8bit|32bit)?")


@dataclass(frozen=True)
class Preconditioner:
    """An optimizer as the tracked parameters see it.

    Attributes:
        kind (`str`): `adamw` or `adam`, with `_8bit`, `_4bit` or `_fp8` where its state has so few bits; `sgd`,
            `adafactor`.
        groups (`tuple[int, ...]`): parameter group of each tracked parameter.
        momentum (`float`): of SGD; 0 otherwise. A push lasts 1 / (1 - momentum) steps.
        weight_decay (`float`): per unit of learning rate.
        update_clipping (`UpdateClipping`): of Adafactor; [`StepCheck`] records it.
    """

    kind: str
    groups: tuple[int, ...]
    momentum: float
    weight_decay: float
    update_clipping: UpdateClipping = field(default_factory=UpdateClipping, compare=False)

    @classmethod
    def of(cls, optimizer: Any, model: nn.Module, parameters: TrackedParameters) -> "Preconditioner":
        """Read the kind of optimizer and check that the mathematics covers it.

        Raises:
            UnsupportedError: another optimizer than Adam, AdamW, Adafactor or SGD, or options without a closed form.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        kind, groups = _kind(optimizer), _groups(optimizer, model, parameters)
        used = [optimizer.param_groups[index] for index in sorted(set(groups))]
        _refuse_options(optimizer, kind, used)
        _refuse_different_options(model, parameters, [optimizer.param_groups[index] for index in groups])
        decay, momentum = float(used[0].get("weight_decay") or 0.0), float(used[0].get("momentum") or 0.0)
        return cls(kind, groups, momentum, decay)

    def learning_rate(self, optimizer: Any) -> float:
        """Return the learning rate of the first tracked parameter; the diagonal holds the others' ratio to it.

        0 where the optimizer itself leaves out the step, as a fused one does when a gradient scaler found overflow.
        """
        if skips_step(optimizer):
            return 0.0
        return float(optimizer.param_groups[self.groups[0]]["lr"])

    @torch.no_grad()
    def diagonal(self, optimizer: Any, model: nn.Module, parameters: TrackedParameters) -> Tensor:
        """Return D, (P,) on the CPU: the derivative of the step by the gradient, times the group's rate ratio.

        1 for SGD; for Adam and AdamW see [`adam_diagonal`], for Adafactor its module; next to nothing for a weight
        that is frozen or never got a gradient, whose response is zero. Collective where the optimizer's state is
        sharded.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        blocks = []
        base = self._rate(optimizer.param_groups[self.groups[0]])
        for index, parameter in zip(self.groups, parameters.tensors(model), strict=True):
            group = optimizer.param_groups[index]
            block = self._block(parameter, optimizer.state.get(parameter, {}), group)
            blocks.append((full_tensor(block) * (self._rate(group) / base)).reshape(-1).cpu())
        return torch.cat(blocks)

    def _block(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the diagonal of one weight, in its shape; of a shard, a shard."""
        ones = torch.ones_like(parameter, dtype=torch.float32)
        if self.kind == "sgd":
            return ones if parameter.requires_grad else ones * _STILL
        if not parameter.requires_grad or not (has_moments(state) or (self.kind == "adafactor" and "step" in state)):
            return ones * _STILL
        if self.kind == "adafactor":
            root = inverse_root(state)
            return torch.where(root > _WITHOUT_GRADIENT, _STILL, root * self.update_clipping.factor(parameter))
        return adam_diagonal(state, group)

    @staticmethod
    def _rate(group: dict[str, Any]) -> float:
        return float(group.get("initial_lr", group["lr"])) or 1.0


def skips_step(optimizer: Any) -> bool:
    """Return whether the step that is being taken will be left out by the optimizer itself: in float16, fused."""
    overflow = getattr(optimizer, "found_inf", None)  # set by torch's gradient scaler, during the step only
    return overflow is not None and float(overflow) > 0


def _kind(optimizer: Any) -> str:
    """Return the kind of an optimizer, by its class.

    Raises:
        UnsupportedError: none that is known.
    """
    name, library = type(optimizer).__name__, type(optimizer).__module__.split(".")[0]
    if type(optimizer) in _KINDS:
        return _KINDS[type(optimizer)]
    if library == "torchao" and (found := _TORCHAO.fullmatch(name)):
        return f"{found[1]}_{found[2]}".lower()
    if library == "bitsandbytes" and _BITSANDBYTES.fullmatch(name):  # whose Adam decays weights as AdamW does
        return "adamw_8bit" if optimizer.args.optim_bits == 8 else "adamw"
    raise UnsupportedError(
        f"optimizer: {type(optimizer).__module__}.{name}. Responses are known for AdamW and Adam (torch's, torchao's "
        "and bitsandbytes'), transformers' Adafactor and torch's SGD. Set TrainingArguments(optim='adamw_torch')"
    )


def _groups(optimizer: Any, model: nn.Module, parameters: TrackedParameters) -> tuple[int, ...]:
    """Return the parameter group of each tracked parameter.

    Raises:
        UnsupportedError: the optimizer does not train it.
    """
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for name, parameter in zip(parameters.names, parameters.tensors(model), strict=True):
        if id(parameter) not in group_of:
            raise UnsupportedError(
                f"{name}: it is not trained by the optimizer, so it has no response. Give it to the optimizer, or "
                "name other weights in ResponseConfig(parameters=...)"
            )
    return tuple(group_of[id(parameter)] for parameter in parameters.tensors(model))


def _refuse_options(optimizer: Any, kind: str, groups: list[dict[str, Any]]) -> None:
    """Refuse options that no closed form covers, in any group of tracked weights.

    Raises:
        UnsupportedError: one is set.
    """
    name = type(optimizer).__name__
    options = [
        (option, group[option])
        for option in ("maximize", "nesterov", "dampening") for group in groups if group.get(option)
    ]  # fmt: skip
    extra = getattr(optimizer, "args", None)  # of bitsandbytes, which keeps them beside its groups
    options += [
        (option, getattr(extra, option)) for option in ("max_unorm", "skip_zeros") if getattr(extra, option, 0)
    ]
    percentile = getattr(extra, "percentile_clipping", 100)
    options += [("percentile_clipping", percentile)] if percentile < 100 else []
    for option, value in options:
        raise UnsupportedError(
            f"{option}={value} of {name}: no closed form says how such steps hand on a row's share. Leave it at its "
            "default"
        )
    for group in groups:
        decay = float(group.get("weight_decay") or 0.0)
        if kind.split("_")[0] == "adam" and decay and not group.get("decoupled_weight_decay"):
            raise UnsupportedError(
                f"weight_decay={decay:g} of Adam: it is divided by the second moment like a gradient, and no response "
                "knows that. Use AdamW, or weight_decay=0"
            )
        if kind == "adafactor":
            refuse_options(group)


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
    first, second = adam_moments(state, group).corrected(group)
    steady = first.square() / second.clamp(min=torch.finfo(torch.float32).tiny)
    return (1.0 - FEEDBACK * steady).clamp(min=_FLOOR) / (second.sqrt() + group["eps"])
