"""What lies between the last hidden state and a token's log-likelihood, done once per token instead of once per direction.

With p the softmax at a position, d log p_y = (W_y - sum_v p_v W_v) . dh: the bracket is one vector per output token,
so a direction's tangent need never visit the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UnsupportedError
from .likelihood import IGNORED, Batch, Likelihood, Objective
from .parameters import Parameters


_ROUNDING = 64  # roundings by which two products with the output layer's weight may differ, relative to the largest


class _Reached(Exception):
    """Raised by the hook on the output layer to end a forward pass there; carries the hidden states."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class Hidden(nn.Module):
    """The model up to the input of its output layer: (queries, positions, features)."""

    def __init__(self, model: nn.Module, objective: Objective, head: nn.Module):
        super().__init__()
        self.model, self.objective = model, objective
        self._head = [head]  # in a list, so that the layer is not registered a second time
        self.training = model.training

    def forward(self, batch: Batch) -> Tensor:
        def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _Reached(inputs[0])

        handle = self._head[0].register_forward_pre_hook(stop)
        try:
            self.objective.forward(self.model, batch)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise RuntimeError("the output layer was never called")

    def at(self, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Hidden states with the weights of these live names replaced."""
        return functional_call(self, {f"model.{name}": weight for name, weight in weights.items()}, (batch,))


def output_layer(model: nn.Module, parameters: Parameters, objective: Objective) -> nn.Module | None:
    """The Linear that makes a causal language model's logits, if nothing in it responds; else None."""
    unwrap = getattr(model, "get_base_model", None)  # PeftModel has it
    inner = unwrap() if callable(unwrap) else model
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if objective.name != "causal-lm" or type(head) is not nn.Linear:
        return None
    responding = {id(tensor) for tensor in parameters.tensors(model)}
    return None if any(id(parameter) in responding for parameter in head.parameters()) else head


def hidden_states(likelihood: Likelihood, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """One plain forward: what went into the output layer, and the logits and labels that came out.

    Raises:
        UnsupportedError: the output layer was not seen to be called.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits, labels = likelihood(batch)
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedError(
            "the output layer was not called, or its hooks were not; of a compiled model that has run before, pass "
            "what was compiled"
        )
    return seen[-1], logits, labels


def hidden_state_gradients(head: nn.Module, hidden: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
    """(queries, positions, features): derivative of each label's log-likelihood by its hidden state; 0 where -100.

    None if the model does something else than the layer between hidden states and logits (soft capping, scaling,
    hooks), in which case the directions have to visit the vocabulary after all.
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
