"""Linear layers with or without LoRA: their VJP, gradients of their weights, and their JVP."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedError
from ..models.lora import LinearLayout, TrackedWeight, linear_layout
from .comparison import nearly_equal


__all__ = ["LinearJVP", "LinearJVPs", "linear_gradient", "linear_vjp", "weight_gradient"]

_KEPT = 1 << 18  # numbers of a matrix that is kept with its adapters added; larger ones are added up when needed


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
    """Tangents through the linear layers of a model, whose weights may have tangents too.

    Args:
        tracked (`Sequence[TrackedWeight]`): all tracked weights, in order.
        dtype (`torch.dtype`): dtype of the products.
    """

    def __init__(self, model: nn.Module, tracked: Sequence[TrackedWeight], dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self._tracked: dict[str, list[tuple[TrackedWeight, int]]] = defaultdict(list)
        for index, weight in enumerate(tracked):
            self._tracked[weight.layer_path].append((weight, index))

    @property
    def tracked_paths(self) -> set[str]:
        """Paths of the layers that have tracked weights."""
        return set(self._tracked)

    def at(self, path: str, x: Tensor, y: Tensor) -> "LinearJVP":
        """Return the JVP of a layer that was called with `x` and gave `y`, both (rows, positions, features).

        A layer is refused that did not compute `y` = W x + bias + adapters, or has a tracked adapter that is inactive;
        a hook, or a later layer that works in place, may have changed `y`.

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
        terms = [(index, self._term(weight, layout, x)) for weight, index in self._tracked.get(path, ())]
        return LinearJVP(layout, self.dtype, x.shape[:2], terms)

    def _term(self, weight: TrackedWeight, layout: LinearLayout, x: Tensor) -> "_WeightTerm":
        """Return the part of the output's tangent that comes of a tracked weight's tangent."""
        adapter = layout.adapters[weight.adapter] if weight.adapter else None
        scale = 1.0 if adapter is None else adapter.scale
        if weight.name.endswith("bias"):
            return _WeightTerm(None, None, scale, False)
        is_transposed = not isinstance(self.model.get_submodule(weight.module_path), nn.Linear)  # Conv1D
        x = x.flatten(0, 1).to(self.dtype)
        if adapter is None:
            return _WeightTerm(x, None, scale, is_transposed)
        if weight.is_down:
            return _WeightTerm(x, adapter.up.to(self.dtype).mT, scale, is_transposed)
        return _WeightTerm(x @ adapter.down.to(self.dtype).mT, None, scale, is_transposed)


@dataclass(frozen=True)
class _WeightTerm:
    """Change of a layer's output by a tracked weight's tangent dW: scale * x dW^T after, or that of a bias.

    Attributes:
        x (`Tensor`, *optional*): (n, in) what the weight is multiplied with; None for a bias.
        after (`Tensor`, *optional*): (r, out) what follows the weight within the layer.
        is_transposed (`bool`): whether the weight is stored as (in, out).
    """

    x: Tensor | None
    after: Tensor | None
    scale: float
    is_transposed: bool

    def add_to(self, result: Tensor, tangent: Tensor) -> None:
        """Add to (k, n, out), for tangents (k, out, in), or (k, out) of a bias."""
        if self.x is None:
            result += tangent.unsqueeze(1) * self.scale
            return
        x, tangent = self.x.expand(len(tangent), *self.x.shape), tangent if self.is_transposed else tangent.mT
        if self.after is None:
            result.baddbmm_(x, tangent, alpha=self.scale)
        else:
            after = self.after.expand(len(tangent), *self.after.shape)
            result.baddbmm_(torch.bmm(x, tangent), after, alpha=self.scale)


class LinearJVP:
    """Tangents of one linear layer in one recorded pass; see `LinearJVPs.at`.

    Args:
        shape: (rows, positions) of that pass.
        terms: index of each tracked weight of the layer, and what its tangent adds.
    """

    def __init__(
        self, layout: LinearLayout, dtype: torch.dtype, shape: Sequence[int], terms: list[tuple[int, _WeightTerm]]
    ):
        self._layout, self._dtype, self._shape, self._terms = layout, dtype, shape, terms
        self._kept: Tensor | None = None
        if layout.matrix.numel() <= _KEPT:
            self._kept = _merged(layout, dtype).T.contiguous()  # products are faster in this order

    def jvp(self, tangents: Tensor | None, weight_tangents: list[Tensor], onto: Tensor | None = None) -> Tensor | None:
        """Return tangents (k, rows, positions, out) of the layer's output; None if nothing moves.

        Args:
            tangents (`Tensor`, *optional*): (k, rows, positions, in) tangents of the input.
            weight_tangents (`list[Tensor]`): (k, *shape) tangents of all tracked weights.
            onto (`Tensor`, *optional*): what the result is added to, in place, and returned.
        """
        if onto is not None and (onto.dtype != self._dtype or not onto.is_contiguous()):
            change = self.jvp(tangents, weight_tangents)
            return onto if change is None else onto.add_(change)
        result = onto if tangents is None else self._product(tangents, onto)
        for index, term in self._terms:
            tangent = weight_tangents[index].to(self._dtype)
            if result is None:
                shape = (len(tangent), *self._shape, self._layout.matrix.shape[0])
                result = torch.zeros(shape, dtype=self._dtype, device=tangent.device)
            term.add_to(result.flatten(1, 2), tangent)
        return result

    def _product(self, tangents: Tensor, onto: Tensor | None) -> Tensor:
        if self._kept is None:
            product = _product(self._layout, tangents, self._dtype)
            return product if onto is None else onto.add_(product)
        flat = tangents.to(self._dtype).flatten(0, -2)
        if onto is None:
            return torch.mm(flat, self._kept).view(*tangents.shape[:-1], -1)
        onto.view(-1, onto.shape[-1]).addmm_(flat, self._kept)
        return onto


def _product(layout: LinearLayout, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply (k, rows, positions, in) with the matrix and all active adapters."""
    x = x.to(dtype)
    if x[..., 0].numel() >= layout.matrix.shape[1]:
        return functional.linear(x, _merged(layout, dtype))
    result = functional.linear(x, layout.matrix.to(dtype))  # few vectors: adding up matrices would be most of the work
    for adapter in layout.adapters.values():
        inner = functional.linear(x, adapter.down.to(dtype))
        result += adapter.scale * functional.linear(inner, adapter.up.to(dtype))
    return result


def _merged(layout: LinearLayout, dtype: torch.dtype) -> Tensor:
    """Return the sum (out, in) of a layer's matrix and its active adapters."""
    matrix = layout.matrix
    for adapter in layout.adapters.values():
        matrix = torch.addmm(matrix.to(adapter.up.dtype), adapter.up, adapter.down, alpha=adapter.scale)
    return matrix.to(dtype)
