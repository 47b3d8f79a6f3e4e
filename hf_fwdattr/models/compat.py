"""Layers that need care: kernels without a derivative or with one of zero, inactive adapters, unfused activations."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import UnsupportedError
from .interrupts import uninterrupted
from .names import adapter_parts


__all__ = [
    "detached_layer",
    "differentiable_layers",
    "fused_activations",
    "refuse_inactive_adapters",
    "refuse_silent_backward",
    "refuse_silent_jvp",
]

# Classes of transformers that compute 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
_TANH_GELU = ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation")


def _bitsandbytes_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [item for item in model.named_modules() if type(item[1]).__module__.startswith("bitsandbytes")]


def refuse_silent_backward(model: nn.Module) -> None:
    """Refuse layers through which gradients silently vanish.

    Raises:
        UnsupportedError: a layer of bitsandbytes on a CPU, whose evaluation kernels have no derivative.
    """
    for name, module in _bitsandbytes_layers(model):
        if getattr(getattr(module, "weight", None), "device", None) == torch.device("cpu"):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__} of bitsandbytes on a CPU. There it has no gradients in "
                "evaluation mode, and every response would be zero. Load the base model without quantisation"
            )


def refuse_silent_jvp(model: nn.Module) -> None:
    """Refuse layers through which forward-mode derivatives may silently vanish.

    With bitsandbytes 0.50 on a CPU, tangents through 4-bit layers are zero; 8-bit layers raise an error of their own.
    On a GPU some of its kernels are called in the same way.

    Raises:
        UnsupportedError: a layer of bitsandbytes or with DoRA; the message names it.
    """
    for name, module in _bitsandbytes_layers(model):
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} of bitsandbytes. Its kernels have no forward-mode derivative, and "
            "scores would be wrong without an error. Use readout='difference', or load the base without quantisation "
            "(`model.dequantize()`)"
        )
    detached = detached_layer(model)
    if detached is not None:
        raise UnsupportedError(
            f"readout='jvp': {detached} has a DoRA adapter, whose norm PEFT detaches from derivatives, although it "
            "changes with the weights: scores would be wrong by tens of percent. Use readout='difference' or 'auto'"
        )


def detached_layer(model: nn.Module) -> str | None:
    """Return a layer that computes with a detached copy of its weights (DoRA's norm); None without one.

    Detached values are constants for every derivative, and yet they change with the weights.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False):
            continue
        dora = {**getattr(layer, "use_dora", {})}
        variants = {key: bool(value) and "Dora" in type(value).__name__ for key, value in _items(layer)}
        if any((dora | variants).get(adapter) for adapter in getattr(layer, "active_adapters", ())):
            return name
    return None


def _items(layer: Any) -> list[tuple[str, Any]]:
    variants = getattr(layer, "lora_variant", None)
    return list(variants.items()) if isinstance(variants, dict) else []


def refuse_inactive_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a model in which no tracked parameter takes part in the forward pass.

    Args:
        names: live names of the tracked parameters.

    Raises:
        UnsupportedError: all belong to LoRA adapters that are merged or disabled.
    """
    name = ""
    for name in names:
        parts = adapter_parts(name)
        layer: Any = model.get_submodule(parts[0]) if parts else None
        if parts is None or not hasattr(layer, "active_adapters"):
            return
        if not (layer.merged or layer.disable_adapters) and parts[2] in layer.active_adapters:
            return
    raise UnsupportedError(
        f"all tracked parameters, {name} among them, belong to adapters that are merged or disabled, and "
        "every score would be zero; call model.unmerge_adapter(), or enable the adapter that was trained"
    )


@contextmanager
def differentiable_layers(model: nn.Module) -> Iterator[None]:
    """Replace what has no forward-mode derivative: a mixture's experts run one after the other, activations are fused.

    The grouped matrix product by which transformers runs all experts at once is differentiated in reverse mode only.
    Results are equal up to rounding.
    """
    kept: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        choice = getattr(config, "_experts_implementation", None)
        if isinstance(choice, str) and choice != "eager":
            kept.setdefault(id(config), (config, choice))
    try:
        for config, _ in kept.values():
            config._experts_implementation = "eager"
        with fused_activations(model):
            yield
    finally:
        with uninterrupted():
            for config, choice in kept.values():
                config._experts_implementation = choice


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """Replace tanh GELUs that are made of single operations by torch's fused one; equal up to rounding."""
    modules = {id(m): m for m in model.modules() if type(m).__name__ in _TANH_GELU and "forward" not in vars(m)}
    try:
        for module in modules.values():
            module.forward = partial(functional.gelu, approximate="tanh")
        yield
    finally:
        with uninterrupted():
            for module in modules.values():
                vars(module).pop("forward", None)  # an interrupt may have come before it was there
