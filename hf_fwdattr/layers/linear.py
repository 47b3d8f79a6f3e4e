"""Tangents through Linear layers, with LoRA on them or not, whose weights may move as well."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedError
from ..models.lora import Weight, active_adapters, tracked_weights, weight_matrix
from ..models.parameters import Parameters
from .block import same


class LinearJVPs:
    """The linear layers of a model.

    Args:
        dtype (`torch.dtype`): of the products.

    Raises:
        UnsupportedError: something responds that is neither a Linear nor a plain LoRA layer.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self._responding: dict[str, list[tuple[Weight, int]]] = defaultdict(list)
        for place, weight in enumerate(tracked_weights(model, parameters)):
            self._responding[weight.layer_path].append((weight, place))

    @property
    def responding(self) -> set[str]:
        """Paths of the layers with weights that respond."""
        return set(self._responding)

    def check(self, path: str) -> None:
        """Refuse a layer that computes something else than a matrix product, or whose adapters respond and rest.

        Raises:
            UnsupportedError: names it.
        """
        layer = self.model.get_submodule(path)
        acting = active_adapters(layer)
        if acting is None:
            raise UnsupportedError(f"{path} is a {type(layer).__name__}, which is not written out")
        for weight, _ in self._responding.get(path, ()):
            if weight.adapter and weight.adapter not in acting:
                raise UnsupportedError(f"{weight.name} responds, but its adapter is merged or switched off")

    def compare(self, path: str, x: Tensor, y: Tensor) -> None:
        """Refuse a layer that did not make `y` of `x`: a hook may have changed it, or who was handed `y` in place.

        Raises:
            UnsupportedError: names it.
        """
        layer: Any = self.model.get_submodule(path)
        expected = self._through(layer, x.unsqueeze(0), x.dtype)[0]
        biases = [(getattr(layer, "base_layer", layer).bias, 1.0)]
        biases += [(layer.lora_B[adapter].bias, layer.scaling[adapter]) for adapter in active_adapters(layer) or ()]
        for bias, scale in biases:
            if bias is not None:
                expected = expected + scale * bias
        if not same(expected, y):
            raise UnsupportedError(f"{path} computes something else than a product with its weights")

    def push(self, path: str, x: Tensor | None, moved: Tensor | None, tangents: list[Tensor]) -> Tensor | None:
        """Tangents (k, rows, positions, out) behind a layer; None where nothing moves.

        Args:
            x (`Tensor`): (rows, positions, in) what goes into the layer; needed where its weights respond.
            moved (`Tensor`, *optional*): (k, rows, positions, in) tangents of that.
            tangents (`list[Tensor]`): (k, *shape) tangents of all responding weights.
        """
        layer: Any = self.model.get_submodule(path)
        result = None
        if moved is not None:
            result = self._through(layer, moved, self.dtype)
        for weight, place in self._responding.get(path, ()):
            assert x is not None
            flat = x.flatten(0, 1).to(self.dtype)
            own = tangents[place].to(self.dtype)
            if result is None:
                shape = (len(own), *x.shape[:2], weight_matrix(layer).shape[0])
                result = torch.zeros(shape, dtype=self.dtype, device=x.device)
            _add(result.flatten(1, 2), layer, weight, flat, own)
        return result

    def _through(self, layer: Any, moved: Tensor, dtype: torch.dtype) -> Tensor:
        """Tangents (k, rows, positions, in) times all that acts in the layer."""
        moved = moved.to(dtype)
        matrix, adapters = weight_matrix(layer), active_adapters(layer) or []
        if moved[..., 0].numel() < matrix.shape[1]:  # few tangents: adding up matrices would be most of the work
            result = functional.linear(moved, matrix.to(dtype))
            for adapter in adapters:
                up, down = (side[adapter].weight.to(dtype) for side in (layer.lora_B, layer.lora_A))
                result += layer.scaling[adapter] * functional.linear(functional.linear(moved, down), up)
            return result
        for adapter in adapters:
            up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            matrix = torch.addmm(matrix.to(up.dtype), up, down, alpha=layer.scaling[adapter])
        return functional.linear(moved, matrix.to(dtype))


def _add(result: Tensor, layer: Any, weight: Weight, x: Tensor, own: Tensor) -> None:
    """Add to (k, n, out) what tangents (k, *shape) of one weight do to x (n, in)."""
    x = x.expand(len(own), *x.shape)
    if weight.name.endswith("bias"):
        result += own.unsqueeze(1) * (layer.scaling[weight.adapter] if weight.adapter else 1.0)
        return
    if not weight.adapter:
        base = getattr(layer, "base_layer", layer)
        result.baddbmm_(x, own.mT if isinstance(base, nn.Linear) else own)
        return
    scale = layer.scaling[weight.adapter]
    if weight.before:
        up = layer.lora_B[weight.adapter].weight.to(x.dtype)
        result.baddbmm_(torch.bmm(x, own.mT), up.mT.expand(len(own), -1, -1), alpha=scale)
    else:
        down = layer.lora_A[weight.adapter].weight.to(x.dtype)
        result.baddbmm_((x[0] @ down.mT).expand(len(own), -1, -1), own.mT, alpha=scale)
