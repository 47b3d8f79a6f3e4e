"""LoRA layout of a layer: its matrix, its bias and its active adapters, and the layers of the tracked weights."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from .names import adapter_parts
from .parameters import TrackedParameters, is_linear


__all__ = ["Adapter", "LinearLayout", "TrackedWeight", "linear_layout", "tracked_weights", "weight_matrix"]


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter, scale * (B A x + bias).

    Attributes:
        down (`Tensor`): A, (r, in).
        up (`Tensor`): B, (out, r).
        bias (`Tensor`, *optional*): (out,).
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float


@dataclass(frozen=True)
class LinearLayout:
    """A Linear, Conv1D or plain LoRA layer: W x + bias + sum of its active adapters.

    Attributes:
        matrix (`Tensor`): W, (out, in).
        bias (`Tensor`, *optional*): (out,).
        adapters (`dict[str, Adapter]`): the active ones by name.
    """

    matrix: Tensor
    bias: Tensor | None
    adapters: dict[str, Adapter]


@dataclass(frozen=True)
class TrackedWeight:
    """A tracked weight and the layer whose output it moves.

    Attributes:
        name (`str`): its live name.
        module_path (`str`): path of the Linear that has it.
        layer_path (`str`): path of the LoRA layer, or of the Linear itself without LoRA.
        adapter (`str`): name of its adapter, empty without LoRA.
        is_down (`bool`): whether it is the A of an adapter, so that gradients pass B on their way to it.
    """

    name: str
    module_path: str
    layer_path: str
    adapter: str
    is_down: bool


def linear_layout(layer: Any) -> LinearLayout | None:
    """Return the layout of a Linear, Conv1D or plain LoRA layer; None for any other layer."""
    base = getattr(layer, "base_layer", layer)
    if not is_linear(base):
        return None
    matrix = weight_matrix(layer)
    if base is layer:
        return LinearLayout(matrix, base.bias, {})
    if not hasattr(layer, "lora_A"):
        return None  # a layer of another PEFT method
    active = [] if layer.merged or layer.disable_adapters else [a for a in layer.active_adapters if a in layer.lora_A]
    if not all(_is_plain(layer, name) for name in active):
        return None
    return LinearLayout(matrix, base.bias, {name: _adapter(layer, name) for name in active})


def weight_matrix(layer: Any) -> Tensor:
    """Return the matrix (out, in) of a Linear or Conv1D, or of the one inside a LoRA layer, without adapters."""
    base = getattr(layer, "base_layer", layer)
    matrix: Tensor = base.weight if isinstance(base, nn.Linear) else base.weight.T
    return matrix


def tracked_weights(model: nn.Module, parameters: TrackedParameters) -> list[TrackedWeight]:
    """Return the tracked weights, in order.

    Raises:
        UnsupportedError: one belongs neither to a Linear nor to a plain LoRA layer, or is used in several layers.
    """
    weights = []
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    for name, tensor in zip(parameters.live, parameters.tensors(model), strict=True):
        module_path, _, kind = name.rpartition(".")
        if uses[id(tensor)] > 1:
            raise UnsupportedError(f"{name} is used in {uses[id(tensor)]} places, and its gradient is a sum over them")
        if kind not in ("weight", "bias") or not is_linear(model.get_submodule(module_path)):
            raise UnsupportedError(f"{name} is not a weight of a Linear layer: activations do not give its gradient")
        parts = adapter_parts(module_path)
        if parts is None or parts[1] not in ("A", "B"):
            weights.append(TrackedWeight(name, module_path, module_path.removesuffix(".base_layer"), "", False))
            continue
        layer_path, side, adapter = parts
        if not _is_plain(model.get_submodule(layer_path), adapter):
            raise UnsupportedError(f"{layer_path} is not a plain LoRA layer: activations do not give its gradient")
        weights.append(TrackedWeight(name, module_path, layer_path, adapter, side == "A"))
    return weights


def _adapter(layer: Any, name: str) -> Adapter:
    up = layer.lora_B[name]
    return Adapter(layer.lora_A[name].weight, up.weight, up.bias, layer.scaling[name])


def _is_plain(layer: Any, adapter: str) -> bool:
    """Return whether a layer computes W x + s B A x, with no variant (such as DoRA) of the adapter."""
    variants = {**getattr(layer, "use_dora", {}), **getattr(layer, "lora_variant", {})}
    return adapter in getattr(layer, "scaling", {}) and not variants.get(adapter)
