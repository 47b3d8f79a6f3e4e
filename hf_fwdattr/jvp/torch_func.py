"""Directional derivatives by torch's forward mode: one run of the model propagates many tangents.

For each direction u_j, query and output token: d/dh log p(token; theta + h u_j) at h = 0, in nats per unit of the
direction's coordinate. No graph is kept and nothing runs backwards, so this works under `torch.no_grad`.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UnsupportedError
from ..models.compat import differentiable_layers, refuse_inactive_adapters, refuse_silent_jvp
from ..models.likelihood import Batch, Likelihood, Objective, log_probabilities
from ..models.output_head import HeadlessModel, hidden_state_gradients, hidden_states, output_layer
from ..models.parameters import TrackedParameters
from .chunking import chunk_size, in_chunks, widest_tangent


__all__ = ["TorchFuncJVP"]


class TorchFuncJVP:
    """A batch of queries, prepared for derivatives of its log-likelihood by `torch.func.jvp`.

    Args:
        model, parameters, objective, batch: as for `AnalyticJVP`.

    Raises:
        UnsupportedError: the model is in training mode, or under `torch.inference_mode`, or cannot be differentiated
            (or, as with bitsandbytes, would be differentiated wrongly).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, parameters: TrackedParameters, objective: Objective, batch: Batch):
        if torch.is_inference_mode_enabled():
            raise UnsupportedError("torch.inference_mode drops derivatives without a word; use torch.no_grad instead")
        if any(module.training for module in model.modules()):
            raise UnsupportedError("the model is in training mode, where dropout is random; call model.eval()")
        refuse_silent_jvp(model)
        refuse_inactive_adapters(model, parameters.live)
        self._model, self._parameters, self._batch = model, parameters, batch
        self._likelihood = Likelihood(model, objective)
        with sdpa_kernel(SDPBackend.MATH), differentiable_layers(model):
            self._value = self._differentiated_function(objective)

    @cached_property
    def _widest(self) -> int:
        return widest_tangent(self._likelihood, self._batch)

    @torch.no_grad()
    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate each token's log-likelihood along directions (k, P).

        Args:
            chunk (`int`, *optional*): directions in flight; as many as fit the memory by default.

        Returns:
            (queries, positions, k), zero where a position is not supervised; float32 (float64 for float64 models).

        Raises:
            NumericalError: a derivative is not finite.
            UnsupportedError: an operation of the model has no batched forward-mode derivative.
        """
        tensors = self._parameters.tensors(self._model)
        weights = dict(zip(self._parameters.live, (tensor.detach() for tensor in tensors), strict=True))

        def derivative(direction: Tensor) -> Tensor:
            pieces = self._parameters.split(direction)
            tangents = {n: t.to(weights[n].dtype) for n, t in zip(weights, pieces, strict=True)}
            return jvp(self._value, (weights,), (tangents,))[1]

        with sdpa_kernel(SDPBackend.MATH), differentiable_layers(self._model):
            chunk = chunk or chunk_size(self._widest, directions.device)
            try:
                return in_chunks(vmap(derivative), directions, chunk)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # the plain forward pass has run, so it is the derivative or the batching
                raise UnsupportedError(
                    f"{type(self._model).__name__} has an operation without batched forward-mode derivative "
                    f"({str(error).splitlines()[0]}); use readout='difference', or attn_implementation='eager'"
                ) from error

    def _differentiated_function(self, objective: Objective) -> Callable[[dict[str, Tensor]], Tensor]:
        """Return a function weights -> (queries, positions) with the derivative of the log-likelihoods.

        Where the output layer is a plain Linear that is not tracked, the function ends at the last hidden state and
        multiplies with the hidden-state gradients.
        """
        likelihood, batch = self._likelihood, self._batch
        head = output_layer(self._model, self._parameters, objective)
        if head is not None:
            hidden, output, logits, labels = hidden_states(likelihood, head, batch)
            gradients = hidden_state_gradients(head, hidden, output, logits, labels)
            if gradients is not None:
                body, positions = HeadlessModel(self._model, objective, head), labels.shape[1]
                return lambda weights: (body.at(weights, batch)[:, :positions].to(gradients.dtype) * gradients).sum(-1)
        return lambda weights: log_probabilities(*likelihood.at(weights, batch))
