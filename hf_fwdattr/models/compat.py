"""Layers whose kernels know no derivative and do not say so: what goes through them comes out as zero."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import UnsupportedError


_ADAPTER = re.compile(r"^(.*)\.lora_[A-Za-z_]+\.([^.]+)(?:\.weight|\.bias)?$")


def _quantised(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of bitsandbytes with their names."""
    return [item for item in model.named_modules() if type(item[1]).__module__.startswith("bitsandbytes")]


def refuse_silent_backward(model: nn.Module) -> None:
    """Refuse layers through which gradients vanish without a word.

    Raises:
        UnsupportedError: bitsandbytes on a CPU, whose kernels of evaluation mode know no derivative.
    """
    for name, module in _quantised(model):
        if getattr(getattr(module, "weight", None), "device", None) == torch.device("cpu"):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__} of bitsandbytes on a CPU, where it gives no gradients in "
                "evaluation mode: every response would be zero. Load the base model without quantisation"
            )


def refuse_silent_jvp(model: nn.Module) -> None:
    """Refuse layers through which forward-mode derivatives vanish, or may, without a word.

    Seen with bitsandbytes 0.50 on a CPU: 4-bit layers gave tangents of zero, and so readouts that were off by most of
    their size; 8-bit ones raise an error of their own. On a GPU some of its kernels are called in the same way.

    Raises:
        UnsupportedError: names the first such layer.
    """
    for name, module in _quantised(model):
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} of bitsandbytes, whose kernels have no forward-mode derivative and "
            "would give wrong scores in silence; use readout='difference', or load the base without quantisation "
            "(`model.dequantize()`)"
        )


def refuse_inactive_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to read weights of which none takes part: every score would be zero.

    Args:
        names: of the responding weights, as they are called in this model.

    Raises:
        UnsupportedError: all are of LoRA adapters that are merged or switched off.
    """
    name = ""
    for name in names:
        found = _ADAPTER.match(name)
        layer: Any = model.get_submodule(found.group(1)) if found else None
        if found is None or not hasattr(layer, "active_adapters"):
            return
        if not (layer.merged or layer.disable_adapters) and found.group(2) in layer.active_adapters:
            return
    raise UnsupportedError(
        f"{name} responds, like others, and all their adapters are merged or switched off, so that every score would "
        "be zero; call model.unmerge_adapter(), or enable the adapter that was trained"
    )


# 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as transformers calls it.
_TANH_GELU = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation")


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """The model with its written-out activations fused; equal up to rounding, restored whatever happens."""
    found = {id(m): m for m in model.modules() if type(m).__name__ in _TANH_GELU and "forward" not in vars(m)}
    try:
        for module in found.values():
            module.forward = partial(functional.gelu, approximate="tanh")
        yield
    finally:
        for module in found.values():
            del module.forward
