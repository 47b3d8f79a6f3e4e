"""The output layer: hidden-state gradients, computed once per token instead of once per direction.

With p the softmax at a position, d log p_y = (W_y - sum_v p_v W_v) . dh. The vector in brackets is the hidden-state
gradient of an output token; a direction's tangent dh is multiplied with it and never visits the vocabulary. For a
confident token the two terms cancel, in bfloat16 down to nothing but rounding. So it is computed as
(1 - p_y) (W_y - sum_v q_v W_v), with q the softmax over all classes but y and 1 - p_y from a difference of logits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .functional import call_with_weights
from .likelihood import IGNORED, Batch, Likelihood, Objective
from .lora import LinearLayout, linear_layout
from .names import base_model
from .parameters import TrackedParameters


__all__ = [
    "HeadlessModel", "find_output_layer", "hidden_state_gradients", "hidden_states", "label_gradients",
    "logit_gradients", "output_layer",
]  # fmt: skip

_ROUNDINGS = {torch.bfloat16: 16, torch.float16: 32}  # by which two products may differ, relative to the largest


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
        return call_with_weights(self, {f"model.{name}": weight for name, weight in weights.items()}, batch)


def find_output_layer(model: nn.Module, objective: Objective) -> nn.Module | None:
    """Return the Linear or plain LoRA layer that makes a causal language model's logits; None if there is none."""
    find = getattr(base_model(model), "get_output_embeddings", None)
    head = find() if callable(find) else None
    copies, active = getattr(head, "modules_to_save", None), list(getattr(head, "active_adapters", ()))
    if isinstance(copies, nn.ModuleDict) and len(active) == 1 and active[0] in copies:
        head = copies[active[0]]  # PEFT's trained copy
    if (
        objective.name not in ("causal-lm", "causal-lm-unshifted")
        or head is None
        or type(getattr(head, "base_layer", head)) is not nn.Linear
    ):
        return None
    return None if linear_layout(head) is None else head


def output_layer(model: nn.Module, parameters: TrackedParameters, objective: Objective) -> nn.Module | None:
    """Return the Linear that makes a causal language model's logits; None if there is none or it is tracked."""
    head = find_output_layer(model, objective)
    if type(head) is not nn.Linear:
        return None
    tracked = {id(tensor) for tensor in parameters.tensors(model)}
    return None if any(id(parameter) in tracked for parameter in head.parameters()) else head


def hidden_states(likelihood: Likelihood, head: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the model and return the inputs and outputs of its output layer, the logits and the labels.

    Raises:
        UnsupportedError: the output layer was not called.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    # Before other hooks, which may change the output.
    handle = head.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)), prepend=True)
    try:
        logits, labels = likelihood(batch)
    finally:
        handle.remove()
    if not calls:
        raise UnsupportedError(
            "the output layer was not called, or its hooks were not. Instead of a compiled model that has run before, "
            "pass the model that was compiled"
        )
    return *calls[-1], logits, labels


def logit_gradients(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate each label's log-likelihood by the logits; float32 or float64.

    Returns:
        1 - p_y, (rows, positions, 1), and q, (rows, positions, classes): the probabilities of the other classes over
        their sum, and 0 for the label. The gradient is (1 - p_y) (e_y - q). Neither cancels where p_y is near 1.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    label = labels.clamp(min=0).unsqueeze(-1)
    others = wide.scatter(-1, label, -torch.inf)
    total = others.logsumexp(-1, keepdim=True)
    doubt = (total - wide.gather(-1, label)).sigmoid()
    return doubt, others.sub_(total).exp_()


def label_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradients themselves, (rows, positions, classes), 0 where labels are -100; see `logit_gradients`."""
    doubt, others = logit_gradients(logits, labels)
    gradients = (-doubt * others).scatter(-1, labels.clamp(min=0).unsqueeze(-1), doubt)
    return gradients.masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)


@torch.no_grad()
def hidden_state_gradients(
    head: nn.Module, hidden: Tensor, output: Tensor, logits: Tensor, labels: Tensor
) -> Tensor | None:
    """Differentiate each label's log-likelihood by its hidden state: (queries, positions, features), 0 where -100.

    None if the logits are not the output layer's product with the hidden states (soft capping, scaling, hooks), in
    which case tangents have to visit the vocabulary.

    Args:
        hidden, output (`Tensor`): what entered and what left the output layer in the pass that made the logits; in
            the precision of that pass, which may be an autocast's.
    """
    layout = linear_layout(head)
    if layout is None or hidden.ndim != 3 or hidden.shape[1] < labels.shape[1]:
        return None
    output, ignored = output[:, : labels.shape[1]], labels == IGNORED
    if output.shape != logits.shape or not bool(((output.to(logits.dtype) == logits).all(-1) | ignored).all()):
        return None
    with torch.autocast(hidden.device.type, enabled=False):
        weight = _matrix(layout)
        if not _is_product(hidden[:, : labels.shape[1]][~ignored][:4], weight, layout, output[~ignored][:4]):
            return None
        doubt, others = logit_gradients(logits, labels)
        contrast = weight[labels.clamp(min=0)].to(doubt.dtype) - (others.to(weight.dtype) @ weight).to(doubt.dtype)
        return (contrast * doubt).masked_fill(ignored.unsqueeze(-1), 0.0)


def _matrix(layout: LinearLayout) -> Tensor:
    """Return the matrix (out, in) of a layer with its active adapters."""
    matrix = layout.matrix
    for adapter in layout.adapters.values():
        matrix = matrix + (adapter.scale * adapter.up @ adapter.down).to(matrix.dtype)
    return matrix


def _is_product(hidden: Tensor, weight: Tensor, layout: LinearLayout, output: Tensor) -> bool:
    """Return whether the outputs at a few positions are the layer's product, up to rounding."""
    dtypes = (hidden.dtype, output.dtype, weight.dtype)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    expected = (hidden.to(weight.dtype) @ weight.mT).float()
    for bias, scale in ((layout.bias, 1.0), *((one.bias, one.scale) for one in layout.adapters.values())):
        expected = expected if bias is None else expected + scale * bias.float()
    rounding = max(torch.finfo(coarsest).eps, torch.finfo(torch.float32).eps) * _ROUNDINGS.get(coarsest, 64)
    return not len(output) or bool((expected - output.float()).abs().amax() <= rounding * expected.abs().amax())
