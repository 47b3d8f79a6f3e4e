"""The output layer: hidden-state gradients, computed once per token instead of once per direction.

With p the softmax at a position, d log p_y = (W_y - sum_v p_v W_v) . dh. The vector in brackets is the hidden-state
gradient of an output token; a direction's tangent dh is multiplied with it and never visits the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UnsupportedError
from .likelihood import IGNORED, Batch, Likelihood, Objective
from .names import base_model
from .parameters import TrackedParameters


__all__ = ["HeadlessModel", "hidden_state_gradients", "hidden_states", "output_layer"]

_ROUNDING = 64  # roundings by which two products with the output layer's weight may differ, relative to the largest


class _OutputLayerReached(Exception):
    """Ends a forward pass at the output layer and carries the hidden states."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class HeadlessModel(nn.Module):
    """The model up to the input of its output layer: (queries, positions, features)."""

    def __init__(self, model: nn.Module, objective: Objective, head: nn.Module):
        super().__init__()
        self.model, self.objective = model, objective
        self._head = [head]  # in a list, so that the layer is not registered a second time
        self.training = model.training

    def forward(self, batch: Batch) -> Tensor:
        def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _OutputLayerReached(inputs[0])

        handle = self._head[0].register_forward_pre_hook(stop)
        try:
            self.objective.forward(self.model, batch)
        except _OutputLayerReached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise RuntimeError("the output layer was not called")

    def at(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return hidden states with the weights of these live names replaced."""
        return functional_call(self, {f"model.{name}": weight for name, weight in weights.items()}, (batch,))


def output_layer(model: nn.Module, parameters: TrackedParameters, objective: Objective) -> nn.Module | None:
    """Return the Linear that makes a causal language model's logits; None if there is none or it is tracked."""
    find = getattr(base_model(model), "get_output_embeddings", None)
    head = find() if callable(find) else None
    if objective.name != "causal-lm" or type(head) is not nn.Linear:
        return None
    tracked = {id(tensor) for tensor in parameters.tensors(model)}
    return None if any(id(parameter) in tracked for parameter in head.parameters()) else head


def hidden_states(likelihood: Likelihood, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model and return the inputs of its output layer, the logits and the labels.

    Raises:
        UnsupportedError: the output layer was not called.
    """
    hidden: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    try:
        logits, labels = likelihood(batch)
    finally:
        handle.remove()
    if not hidden:
        raise UnsupportedError(
            "the output layer was not called, or its hooks were not. Instead of a compiled model that has run before, "
            "pass the model that was compiled"
        )
    return hidden[-1], logits, labels


def hidden_state_gradients(head: nn.Module, hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
    """Differentiate each label's log-likelihood by its hidden state: (queries, positions, features), 0 where -100.

    None if the logits are not the output layer's product with the hidden states (soft capping, scaling, hooks), in
    which case tangents have to visit the vocabulary.
    """
    if hidden.ndim != 3 or hidden.shape[1] < labels.shape[1]:
        return None
    weight = head.weight
    assert isinstance(weight, Tensor)
    plain = head.forward(hidden)[:, : labels.shape[1]].to(logits.dtype)
    rounding = _ROUNDING * torch.finfo(hidden.dtype).eps * float(logits.abs().amax())
    if not float((plain - logits).abs().amax()) <= rounding:
        return None
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mean = wide.softmax(-1).to(weight.dtype) @ weight
    hidden_gradients = weight[labels.clamp(min=0)].to(wide.dtype) - mean.to(wide.dtype)
    return hidden_gradients.masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)
