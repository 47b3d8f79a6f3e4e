"""Linear layers with or without LoRA: their VJP, gradients of their weights, and their JVP."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedError
from ..models.lora import LinearLayout, TrackedWeight, linear_layout, tracked_weights
from ..models.parameters import TrackedParameters
from .comparison import nearly_equal


__all__ = ["LinearJVPs", "linear_gradient", "linear_vjp", "weight_gradient"]


def linear_vjp(layer: nn.Module, gradient: Tensor) -> Tensor | None:
    """Turn a gradient (..., out) by a layer's output into the one by its input (..., in).

    Returns:
        None if the layer is no Linear, Conv1D or plain LoRA layer.
    """
    layout = linear_layout(layer)
    if layout is None:
        return None
    result = gradient @ layout.matrix.to(gradient.dtype)
    for adapter in layout.adapters.values():
        up, down = adapter.up.to(gradient.dtype), adapter.down.to(gradient.dtype)
        result = result + adapter.scale * (gradient @ up) @ down
    return result


def linear_gradient(module: nn.Module, name: str, x: Tensor, gradient: Tensor) -> Tensor:
    """Return per-row gradients (rows, *shape) by a Linear's or Conv1D's weight or bias, whichever `name` ends with.

    Args:
        x (`Tensor`): (rows, positions, in) the module's input.
        gradient (`Tensor`): (rows, positions, out) the gradient by its output.
    """
    if name.endswith("bias"):
        return gradient.sum(1)
    return gradient.transpose(1, 2) @ x if isinstance(module, nn.Linear) else x.transpose(1, 2) @ gradient


def weight_gradient(model: nn.Module, weight: TrackedWeight, x: Tensor, gradient: Tensor) -> Tensor:
    """Return per-row gradients (rows, *shape) by a tracked weight, which may be an adapter's.

    Args:
        x (`Tensor`): (rows, positions, in) input of the weight's module.
        gradient (`Tensor`): (rows, positions, out) gradient by the output of the weight's layer.
    """
    if weight.adapter:
        layer: Any = model.get_submodule(weight.layer_path)
        gradient = layer.scaling[weight.adapter] * gradient
        if weight.is_down:
            gradient = gradient @ layer.lora_B[weight.adapter].weight.to(gradient.dtype)
    return linear_gradient(model.get_submodule(weight.module_path), weight.name, x.to(gradient.dtype), gradient)


class LinearJVPs:
    """Tangents through all linear layers of a model, whose weights may have tangents too.

    Args:
        dtype (`torch.dtype`): dtype of the products.

    Raises:
        UnsupportedError: a tracked parameter belongs neither to a Linear nor to a plain LoRA layer.
    """

    def __init__(self, model: nn.Module, parameters: TrackedParameters, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self._tracked: dict[str, list[tuple[TrackedWeight, int]]] = defaultdict(list)
        for index, weight in enumerate(tracked_weights(model, parameters)):
            self._tracked[weight.layer_path].append((weight, index))

    @property
    def tracked_paths(self) -> set[str]:
        """Paths of the layers that have tracked weights."""
        return set(self._tracked)

    def check(self, path: str, x: Tensor, y: Tensor) -> None:
        """Refuse a layer that did not compute `y` = W x + bias + adapters, or has a tracked adapter that is inactive.

        A hook, or a later layer that works in place, may have changed `y`.

        Raises:
            UnsupportedError: the message names the layer or the weight.
        """
        layer = self.model.get_submodule(path)
        layout = linear_layout(layer)
        if layout is None:
            raise UnsupportedError(f"{path} is a {type(layer).__name__}, for which there is no analytic JVP")
        for weight, _ in self._tracked.get(path, ()):
            if weight.adapter and weight.adapter not in layout.adapters:
                raise UnsupportedError(f"{weight.name} is tracked, but its adapter is merged or disabled")
        expected = _product(layout, x.unsqueeze(0), x.dtype)[0]
        if layout.bias is not None:
            expected = expected + layout.bias
        for adapter in layout.adapters.values():
            if adapter.bias is not None:
                expected = expected + adapter.scale * adapter.bias
        if not nearly_equal(expected, y):
            raise UnsupportedError(f"{path} does not compute a product with its weights")

    def jvp(
        self, path: str, x: Tensor | None, tangents: Tensor | None, weight_tangents: list[Tensor]
    ) -> Tensor | None:
        """Return tangents (k, rows, positions, out) of a layer's output; None if nothing moves.

        Args:
            x (`Tensor`, *optional*): (rows, positions, in) input of the layer; needed where its weights are tracked.
            tangents (`Tensor`, *optional*): (k, rows, positions, in) tangents of the input.
            weight_tangents (`list[Tensor]`): (k, *shape) tangents of all tracked weights.
        """
        layout = linear_layout(self.model.get_submodule(path))
        assert layout is not None  # `check` refuses other layers
        result = None if tangents is None else _product(layout, tangents, self.dtype)
        for weight, index in self._tracked.get(path, ()):
            assert x is not None
            weight_tangent = weight_tangents[index].to(self.dtype)
            if result is None:
                shape = (len(weight_tangent), *x.shape[:2], layout.matrix.shape[0])
                result = torch.zeros(shape, dtype=self.dtype, device=x.device)
            if weight.name.endswith(".weight") and not isinstance(
                self.model.get_submodule(weight.module_path), nn.Linear
            ):
                weight_tangent = weight_tangent.mT  # Conv1D
            _add_weight_jvp(result.flatten(1, 2), layout, weight, x.flatten(0, 1).to(self.dtype), weight_tangent)
        return result


def _product(layout: LinearLayout, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply (k, rows, positions, in) with the matrix and all active adapters."""
    x = x.to(dtype)
    adapters = layout.adapters.values()
    if x[..., 0].numel() < layout.matrix.shape[1]:  # few vectors: adding up matrices would be most of the work
        result = functional.linear(x, layout.matrix.to(dtype))
        for adapter in adapters:
            inner = functional.linear(x, adapter.down.to(dtype))
            result += adapter.scale * functional.linear(inner, adapter.up.to(dtype))
        return result
    matrix = layout.matrix
    for adapter in adapters:
        matrix = torch.addmm(matrix.to(adapter.up.dtype), adapter.up, adapter.down, alpha=adapter.scale)
    return functional.linear(x, matrix.to(dtype))


def _add_weight_jvp(result: Tensor, layout: LinearLayout, weight: TrackedWeight, x: Tensor, tangent: Tensor) -> None:
    """Add to (k, n, out) the product of x (n, in) with tangents of one weight: (k, out, in), or (k, out) of a bias."""
    adapter = layout.adapters[weight.adapter] if weight.adapter else None
    x = x.expand(len(tangent), *x.shape)
    if weight.name.endswith("bias"):
        result += tangent.unsqueeze(1) * (1.0 if adapter is None else adapter.scale)
    elif adapter is None:
        result.baddbmm_(x, tangent.mT)
    elif weight.is_down:
        up = adapter.up.to(x.dtype).mT.expand(len(tangent), -1, -1)
        result.baddbmm_(torch.bmm(x, tangent.mT), up, alpha=adapter.scale)
    else:
        down = adapter.down.to(x.dtype)
        result.baddbmm_((x[0] @ down.mT).expand(len(tangent), -1, -1), tangent.mT, alpha=adapter.scale)
