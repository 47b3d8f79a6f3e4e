"""Which layer a responding weight moves, and the way back through a linear layer."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from .parameters import Parameters, is_linear


_ADAPTER = re.compile(r"^(.*)\.lora_([AB])\.([^.]+)$")


@dataclass(frozen=True)
class Weight:
    """A responding weight.

    Attributes:
        name (`str`): its live name.
        owner (`str`): path of the Linear that it belongs to.
        host (`str`): path of the layer whose output it moves: the LoRA layer, or the Linear itself.
        adapter (`str`): name of its adapter, empty without LoRA.
        before (`bool`): whether it is the `A` of an adapter, so that an error passes through `B` first.
    """

    name: str
    module_path: str
    layer_path: str
    adapter: str
    before: bool


def tracked_weights(model: nn.Module, parameters: Parameters) -> list[Weight]:
    """The responding weights, in order.

    Raises:
        UnsupportedError: one is neither of a Linear nor of a plain LoRA layer, or is used in several places.
    """
    found = []
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    for name, tensor in zip(parameters.live, parameters.tensors(model), strict=True):
        module_path, _, kind = name.rpartition(".")
        if uses[id(tensor)] > 1:
            raise UnsupportedError(f"{name} is used in {uses[id(tensor)]} places, and each adds to its gradient")
        if kind not in ("weight", "bias") or not is_linear(model.get_submodule(module_path)):
            raise UnsupportedError(f"{name} is not of a Linear layer, so one forward does not show its gradient")
        adapter = _ADAPTER.match(module_path)
        if adapter is None:
            found.append(Weight(name, module_path, module_path.removesuffix(".base_layer"), "", False))
            continue
        layer_path, kind, label = adapter.groups()
        if not _plain(model.get_submodule(layer_path), label):
            raise UnsupportedError(
                f"{layer_path} is not a plain LoRA layer, so one forward does not show its gradient"
            )
        found.append(Weight(name, module_path, layer_path, label, kind == "A"))
    return found


def parameter_gradient(model: nn.Module, weight: Weight, x: Tensor, error: Tensor) -> Tensor:
    """(rows, *shape) of one weight, from its owner's input and the error at its host's output."""
    module_path: Any = model.get_submodule(weight.module_path)
    if weight.adapter:
        layer: Any = model.get_submodule(weight.layer_path)
        error = layer.scaling[weight.adapter] * error
        if weight.before:
            error = error @ layer.lora_B[weight.adapter].weight.to(error.dtype)
    if weight.name.endswith("bias"):
        return error.sum(1)
    x = x.to(error.dtype)
    return error.transpose(1, 2) @ x if isinstance(module_path, nn.Linear) else x.transpose(1, 2) @ error


def active_adapters(layer: Any) -> list[str] | None:
    """Names of the adapters that act in a Linear, Conv1D or plain LoRA layer; None for layers of other kinds."""
    base = getattr(layer, "base_layer", layer)
    if not is_linear(base):
        return None
    if base is layer:
        return []
    if not hasattr(layer, "lora_A"):
        return None  # another method's layer
    if layer.merged or layer.disable_adapters:
        return []
    acting = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    return acting if all(_plain(layer, adapter) for adapter in acting) else None


def weight_matrix(layer: Any) -> Tensor:
    """(out, in) of a Linear or Conv1D, or of the one inside a LoRA layer, without its adapters."""
    base = getattr(layer, "base_layer", layer)
    matrix: Tensor = base.weight if isinstance(base, nn.Linear) else base.weight.T
    return matrix


def linear_vjp(layer: Any, error: Tensor) -> Tensor | None:
    """(..., in): an error (..., out) behind a Linear, Conv1D or plain LoRA layer, before it; None for other layers."""
    adapters = active_adapters(layer)
    if adapters is None:
        return None
    result = error @ weight_matrix(layer).to(error.dtype)
    for adapter in adapters:
        up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        result = result + layer.scaling[adapter] * (error @ up.to(error.dtype)) @ down.to(error.dtype)
    return result


def _plain(layer: Any, adapter: str) -> bool:
    """Whether a layer computes W x + s B A x, with nothing else that depends on the adapter."""
    variants = {**getattr(layer, "use_dora", {}), **getattr(layer, "lora_variant", {})}
    return adapter in getattr(layer, "scaling", {}) and not variants.get(adapter)
