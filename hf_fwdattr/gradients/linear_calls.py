"""Calls of Linear layers in one forward pass, from which each row's gradient follows."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import UnsupportedError
from ..layers.linear import linear_gradient
from ..models.likelihood import Batch


__all__ = ["LinearCalls", "RowlessActivation", "refuse_rowless_tensors", "wide"]


class RowlessActivation(UnsupportedError):
    """A layer's activation has no dimension for the rows."""

    def __init__(self, message: str, path: str):
        super().__init__(message)
        self.path = path


class LinearCalls:
    """Calls of the hooked Linears in one forward pass: inputs, and outputs in the graph.

    Attributes:
        rows_are_separate (`bool`): whether the first dimension of all their inputs is the rows; set by `gradients`.
        dtypes (`set`): dtypes of inputs and outputs.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        self.names = names
        self.modules = {path: model.get_submodule(path) for path in {name.rpartition(".")[0] for name in names}}
        self.calls: list[tuple[str, Tensor, GradientEdge]] = []
        self.rows_are_separate, self.dtypes = True, set[torch.dtype]()

    def __enter__(self) -> "LinearCalls":
        self._handles = [module.register_forward_hook(self._hook(path)) for path, module in self.modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # With nothing trainable, the graph begins at the first of these outputs. The model goes on with a copy,
            # which it may change in place; of the original only its edge in the graph is kept.
            source = output if output.requires_grad else output.detach().requires_grad_(True)
            self.dtypes |= {inputs[0].dtype, output.dtype}
            self.calls.append((path, inputs[0].detach(), get_gradient_edge(source)))
            return source.clone()

        return hook

    def gradients(self, loss: Tensor, rows: int, positions: int) -> dict[str, Tensor]:
        """Return gradients (rows, *shape) by live name, summed over all calls of a module."""
        edges = [edge for _, _, edge in self.calls]
        by_outputs: tuple[Tensor | None, ...] = torch.autograd.grad(loss, edges, allow_unused=True)
        result: dict[str, Tensor] = {}
        for (path, x, _), gradient in zip(self.calls, by_outputs, strict=True):
            if gradient is None:
                continue
            self.rows_are_separate &= x.ndim > 2 or (x.shape[0] == rows and positions == 1)
            x, gradient = _rows_first(x, rows, path), _rows_first(gradient, rows, path)
            for name in self.names:
                if name.rpartition(".")[0] == path:
                    block = linear_gradient(self.modules[path], name, x, gradient)
                    result[name] = result[name] + block if name in result else block
        return result


def refuse_rowless_tensors(batch: Batch, rows: int) -> None:
    """Refuse several rows in a batch with a tensor that is not indexed by them, such as the patches of all images.

    Raises:
        UnsupportedError: the message names the tensor.
    """
    for name, value in batch.items():
        if rows > 1 and isinstance(value, Tensor) and (value.ndim == 0 or len(value) != rows):
            raise UnsupportedError(
                f"{name}: shape {tuple(value.shape)} in a batch of {rows} rows. Its first dimension is not the rows, "
                "so they cannot be told apart. Set ResponseConfig(batch_size=1)"
            )


def _rows_first(tensor: Tensor, rows: int, path: str) -> Tensor:
    """Reshape an activation to (rows, positions, features), float32 or float64."""
    if tensor.ndim == 2 and tensor.shape[0] != rows and tensor.shape[0] % rows == 0:
        tensor = tensor.unflatten(0, (rows, -1))  # some models flatten (rows, positions) into one dimension
    if tensor.shape[0] != rows:
        raise RowlessActivation(
            f"{path} has an activation of shape {tuple(tensor.shape)} in a batch of {rows} rows. None of its "
            "dimensions is the rows, so that rows have no gradient of their own. Track other parameters",
            path,
        )
    return wide(tensor).reshape(rows, -1, tensor.shape[-1])


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 if it is, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
