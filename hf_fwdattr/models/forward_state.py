"""State of a forward pass beyond the tracked weights: the other weights that run, and how adapters are switched on.

Of each weight a sample of values is read, spread evenly, so that the cost does not grow with the model: all values of
small weights, 65,536 of large ones. Their sha256 tells two states apart; where they were loaded in other dtypes, one
number per weight is compared instead, the sum of the sample with random signs over its norm. Numbers that modules
compute with (epsilons, scales, soft caps, rotary frequencies) and the activation function belong to the state too.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fsdp import is_sharded
from .names import adapter_parts, base_model, canonical_name


__all__ = [
    "SETTING", "ForwardState", "StateMonitor", "adapter_scalings", "forward_state", "module_settings",
    "untracked_weights",
]  # fmt: skip

SETTING = ":"  # in the name of a setting, between a module's path and the setting's name
_SAMPLE = 1 << 16  # values of a weight that are read, at most
_NUMBERS = re.compile(r"(^|_)eps(ilon)?$|scal|softcap|multiplier")  # names of modules' numbers; not dropout or noise
_CONFIG = ("hidden_act", "hidden_activation", "activation_function", "sliding_window", "final_logit_softcapping")


@dataclass(frozen=True)
class ForwardState:
    """State that a forward pass uses, but for the tracked weights.

    Attributes:
        sha256 (`str`): of names, shapes and sampled values in float32.
        dtypes (`str`): the weights' dtypes, as they are in memory; a hash of other dtypes cannot be compared.
        sketches (`dict[str, float]`): a number per weight, by canonical name, that dtypes change by rounding only; and
            the settings of `module_settings`.
        norms (`dict[str, float]`): root mean square of every weight's sample, the unit of that rounding.
        scalings (`dict[str, float]`): sum of the scalings of its active adapters, by canonical path of the layer.
    """

    sha256: str
    dtypes: str
    sketches: dict[str, float]
    norms: dict[str, float]
    scalings: dict[str, float]


def forward_state(model: nn.Module, tracked: Iterable[str]) -> ForwardState | None:
    """Return the state of a model's forward pass; None for a model that is sharded over processes.

    Args:
        tracked: live names of the tracked weights, which are compared exactly elsewhere.
    """
    if is_sharded(model):
        return None
    digest, dtypes = hashlib.sha256(), set()
    sketches: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name, tensor in sorted(untracked_weights(model, set(tracked)).items()):
        values = _sample(tensor)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
        sketches[name] = _sketch(values)
        norms[name] = float(values.double().square().mean().sqrt()) if len(values) else 0.0
    sketches |= dict(module_settings(model))
    scalings = {path: sum(values) for path, values in adapter_scalings(model)}
    return ForwardState(digest.hexdigest(), ",".join(sorted(dtypes)), sketches, norms, scalings)


def untracked_weights(model: nn.Module, tracked: set[str]) -> dict[str, Tensor]:
    """Return parameters and saved buffers that run and are not tracked, by canonical name; shared ones once."""
    active = _active_adapters(model)
    result: dict[str, Tensor] = {}
    for name, tensor in _saved_tensors(model):
        parts = adapter_parts(name)
        rests = parts is not None and parts[0] in active and parts[2] not in active[parts[0]]
        if name in tracked or rests or ".original_module." in name or tensor.is_meta:
            continue
        canonical = canonical_name(name)
        if canonical in result:  # two adapters that run on one layer have one canonical name
            canonical = name
        result[canonical] = tensor
    return result


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def adapter_scalings(model: nn.Module) -> Iterator[tuple[str, list[float]]]:
    """Yield every layer with active LoRA adapters, by canonical path, and their scalings."""
    for path, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and hasattr(module, "active_adapters"):
            off = getattr(module, "disable_adapters", False)
            names = [] if off else [name for name in module.active_adapters if name in scaling]
            yield canonical_name(path), [float(scaling[name]) for name in names]


def module_settings(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield what modules compute with beside weights, as `path:name` and a number.

    These are modules' numbers, the mean of rotary frequencies, and a few fields of the config; text is hashed.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and math.isfinite(value) and _NUMBERS.search(name):
                yield f"{canonical_name(path)}{SETTING}{name}", value
        frequencies = module._buffers.get("original_inv_freq")
        if frequencies is not None and not frequencies.is_meta:
            yield f"{canonical_name(path)}{SETTING}inv_freq", float(frequencies.to("cpu", torch.float64).mean())
    config: Any = getattr(base_model(model), "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    for name in _CONFIG:
        value = getattr(text, name, None)
        if isinstance(value, str):
            value = int(hashlib.sha256(value.encode()).hexdigest()[:6], 16)
        if isinstance(value, int | float):
            yield f"config{SETTING}{name}", float(value)


def _active_adapters(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the active adapters of every layer with LoRA, by its path."""
    return {
        path: list(module.active_adapters)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters")
    }


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, math.ceil(flat.numel() / _SAMPLE))].to("cpu", torch.float32).contiguous()


def _sketch(values: Tensor) -> float:
    """Return the sum of values with random signs, in units of the root of their number."""
    if not len(values):
        return 0.0
    signs = torch.randint(0, 2, (len(values),), generator=torch.Generator().manual_seed(len(values))) * 2 - 1
    total = float((values.double() * signs).sum()) / math.sqrt(len(values))
    return total if math.isfinite(total) else 0.0


class StateMonitor:
    """Notices cheaply that a model's weights or adapters may have changed since it was last asked.

    Weights are compared by memory address, by the number of writes that torch counts, and by one value of each,
    since writes through `.data` are not counted. What is noticed may be the same values, written again: a fingerprint
    decides.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._seen = self._marks()

    def changed(self) -> bool:
        """Return whether something may have changed."""
        return self._seen != self._marks()

    def renew(self) -> None:
        """Take the present state for the known one."""
        self._seen = self._marks()

    def _marks(self) -> list[object]:
        weights = [(id(p), p.data_ptr(), p._version) for p in self._model.parameters()]
        adapters = [(path, *values) for path, values in adapter_scalings(self._model)]
        active = list(_active_adapters(self._model).items())
        return [weights, _middle_values(self._model), adapters, active]


def _middle_values(model: nn.Module) -> list[float]:
    """Return one value of every weight, not a number as 0; none of a model that is sharded."""
    weights = [] if is_sharded(model) else [p.detach() for p in model.parameters() if not p.is_meta and p.numel()]
    picked = [w[tuple(size // 2 for size in w.shape)] for w in weights]
    devices = {value.device for value in picked}
    together = [torch.stack([v.float() for v in picked if v.device == device]) for device in devices]
    return [value for stacked in together for value in stacked.nan_to_num().tolist()]
