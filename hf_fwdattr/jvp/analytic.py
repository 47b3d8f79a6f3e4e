"""Directional derivatives by analytic layers: one forward pass is recorded, and tangents pass through its layers.

Hidden-state gradients at the end of the model turn the last layer's tangents into derivatives of token
log-likelihoods, so that no tangent visits the vocabulary.
"""

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..layers.activations import ActivationRecorder
from ..layers.decoder import DecoderLayer, DecoderLayerJVP, check_chain, decoder_layers
from ..layers.linear import LinearJVPs
from ..layers.norm import norm_vjp
from ..layers.recorded_pass import RecordedPass
from ..models.compat import fused_activations
from ..models.likelihood import Batch, Likelihood, Objective
from ..models.lora import tracked_weights, weight_matrix
from ..models.output_head import hidden_state_gradients, output_layer
from ..models.parameters import TrackedParameters
from .chunking import chunk_size, free_bytes, in_chunks


__all__ = ["AnalyticJVP", "AnalyticModel", "TooLarge"]

_CPU_RECORDED = 1 << 31  # largest number of bytes of recorded activations on a CPU; on a GPU half of what is free
_COPIES = 3  # copies of a layer's outputs: as recorded, and what is derived from them
_CPU_CACHE = 3 << 22  # bytes of tangents in a chunk on a CPU: what its caches hold, as a further chunk costs little


class TooLarge(UnsupportedError):
    """The activations of a batch do not fit into memory."""


class AnalyticModel:
    """Parts of a model that its batches have in common, found once: output layer, decoder layers, tracked weights.

    Args:
        model, parameters, objective: as for `AnalyticJVP`.

    Raises:
        UnsupportedError: the model has no analytic layers, or tracked parameters outside its linear layers.
    """

    def __init__(self, model: nn.Module, parameters: TrackedParameters, objective: Objective):
        head, layers = output_layer(model, parameters, objective), decoder_layers(model)
        if head is None or not layers:
            raise UnsupportedError(f"{type(model).__name__} is in training mode, or has no analytic layers")
        self.head, self.layers, self.objective = head, layers, objective
        self.tracked = tracked_weights(model, parameters)
        self.modules = list(model.modules())

    def describes(self, model: nn.Module, objective: Objective) -> bool:
        """Return whether the model still consists of the same modules, and the likelihood is the same."""
        modules = list(model.modules())
        same = len(modules) == len(self.modules) and all(map(operator.is_, modules, self.modules))
        return same and objective is self.objective


class AnalyticJVP:
    """A batch of queries, passed once through the model and prepared for derivatives of its log-likelihood.

    Args:
        model (`nn.Module`): in evaluation mode; its weights must be the same whenever `jvp` is called.
        parameters (`TrackedParameters`): the tracked parameters.
        objective (`Objective`): the likelihood.
        batch (`Mapping`): tensors (queries, positions), right-padded, with `labels` that are -100 outside the output.
        dtype (`torch.dtype`, *optional*): dtype of the products that tangents pass through, by default the model's.
            The model's own computation and the sum over layers are not rounded to it.
        also (`Collection[str]`): paths of further layers, for whose sake the pass is kept in `recorded`.
        parts (`AnalyticModel`, *optional*): of this model and objective; found if it is not given.

    Attributes:
        recorded (`RecordedPass`, *optional*): the pass, if `also` was given; not under autocast, which would round its
            error. Whoever has used it sets it to None, which frees its memory.

    Raises:
        UnsupportedError: the model has no analytic layers (not a decoder-only language model of a known kind, tracked
            parameters outside its linear layers), or does not compute what the analytic layers compute.
        TooLarge: the recorded activations would not fit.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, parameters: TrackedParameters, objective: Objective, batch: Batch,
        dtype: torch.dtype | None = None, also: Collection[str] = (), parts: AnalyticModel | None = None,
    ):  # fmt: skip
        parts = parts or AnalyticModel(model, parameters, objective)
        if any(module.training for module in parts.modules):
            raise UnsupportedError(f"{type(model).__name__} is in training mode, or has no analytic layers")
        layers, weight = parts.layers, model.get_parameter(parameters.live[0])
        self._parameters, self._device = parameters, weight.device
        self.dtype = dtype or _product_dtype(weight)
        self._linears = LinearJVPs(model, parts.tracked, self.dtype)
        self._widest = self._widest_tangent(model, layers, batch)
        outside = sorted(self._linears.tracked_paths - {path for layer in layers for path in layer.linears})
        if outside:
            raise UnsupportedError(f"{outside[0]} is tracked and is in no analytic layer")
        with fused_activations(model):
            self._record(model, parts, batch, also)

    def _record(self, model: nn.Module, parts: AnalyticModel, batch: Batch, also: Collection[str]) -> None:
        """Pass the batch through the model, and prepare its layers for tangents."""
        head, layers = parts.head, parts.layers
        paths = {path for layer in layers for path in layer.recorded_paths} | set(also)
        attentions = [layer.blocks[0].path for layer in layers]
        recorder = ActivationRecorder(model, paths, attentions, head)
        with recorder:
            logits, self.labels = Likelihood(model, parts.objective)(batch)
        if recorder.hidden is None or recorder.head_output is None:
            raise UnsupportedError("the output layer was not called, or its hooks were not")
        gradients = hidden_state_gradients(head, recorder.hidden, recorder.head_output, logits, self.labels)
        if gradients is None:
            raise UnsupportedError("between the last hidden state and the logits is more than one Linear layer")
        norm = check_chain(layers, recorder)
        gradients = norm_vjp(norm.module, norm.input, norm.output, gradients)
        if gradients is None:
            raise UnsupportedError("the last norm is not analytic")
        self.recorded: RecordedPass | None = None
        if also and not torch.is_autocast_enabled(self._device.type):
            self.recorded = RecordedPass(recorder, logits, self.labels, gradients)
        self._gradients = gradients  # of the log-likelihoods by the last layer's output
        self._layers = [DecoderLayerJVP(model, layer, recorder, self._linears) for layer in layers]

    def _widest_tangent(self, model: nn.Module, layers: list[DecoderLayer], batch: Batch) -> int:
        """Return the bytes of the widest tangent of one direction: a projection's, or an attention's weights.

        Raises:
            TooLarge: the recorded activations would not fit, together with one attention's weights.
        """
        widths = [int(weight_matrix(model.get_submodule(path)).shape[0]) for layer in layers for path in layer.linears]
        token_bytes = 4 * batch["labels"].numel()
        heads = []
        for attention, _ in (layer.blocks for layer in layers):
            module: Any = model.get_submodule(attention.path)
            heads.append(int(weight_matrix(model.get_submodule(attention.output)).shape[1]) // module.head_dim)
        weights = token_bytes * max(heads) * batch["labels"].shape[1]
        limit = free_bytes(self._device) // 2 if self._device.type == "cuda" else _CPU_RECORDED
        if _COPIES * (token_bytes * sum(widths) + weights) > limit:
            raise TooLarge(f"recording a pass over {batch['labels'].numel()} tokens takes over {limit >> 20} MiB")
        return max(token_bytes * max(widths), weights)

    @torch.no_grad()
    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate each token's log-likelihood along directions (k, P).

        Args:
            chunk (`int`, *optional*): directions in flight; by default even chunks of as many as fit the memory.

        Returns:
            (queries, positions, k), zero where a position is not supervised; float32 (float64 for float64 models).

        Raises:
            NumericalError: a derivative is not finite.
        """
        if chunk is None:
            chunks = math.ceil(len(directions) / chunk_size(self._widest, self._device, _CPU_CACHE))
            chunk = math.ceil(len(directions) / chunks)
        with torch.autocast(self._device.type, enabled=False):
            return in_chunks(self._derivatives, directions, chunk)

    def _derivatives(self, directions: Tensor) -> Tensor:
        """Propagate one chunk (k, P) of directions; (k, queries, positions)."""
        parameter_tangents = self._parameters.split(directions)
        tangents = None
        for layer in self._layers:
            tangents = layer.jvp(tangents, parameter_tangents)
        if tangents is None:
            return torch.zeros(len(directions), *self.labels.shape, device=directions.device)
        tangents = tangents[:, :, : self.labels.shape[1]]
        return (tangents * self._gradients.to(tangents.dtype)).sum(-1)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a model computes its products, by one of its weights."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
