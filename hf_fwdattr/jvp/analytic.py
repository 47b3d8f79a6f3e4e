"""Readout of many directions from one forward pass that is kept: derivatives of token log-likelihoods, written out."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericalError, UnsupportedError
from ..layers.activations import ActivationRecorder, watching
from ..layers.decoder import DecoderLayer, DecoderLayerJVP, check_chain, decoder_layers
from ..layers.linear import LinearJVPs
from ..layers.norm import norm_vjp
from ..models.compat import fused_activations
from ..models.likelihood import Batch, Likelihood, Objective
from ..models.lora import weight_matrix
from ..models.output_head import hidden_state_gradients, output_layer
from ..models.parameters import Parameters
from .chunking import chunk_size, free_bytes, unit


_CPU_KEPT = 1 << 31  # bytes of what is kept of the forward pass, at most; on a GPU half of what is free
_KEPT = 3  # copies of a layer's outputs: as they are seen, and what is made of them
_CPU_CACHE = (
    1 << 26
)  # bytes of tangents in a handful of directions: more than torch's way has, as fewer are alive at once


class TooLarge(UnsupportedError):
    """The batch takes more memory than there is for it."""


class AnalyticJVP:
    """A batch of queries, passed once through the model, ready to be read along directions.

    Args:
        model (`nn.Module`): in evaluation mode; its weights must not change while this is used.
        batch (`Mapping`): tensors (queries, positions), right-padded, with `labels`.
        dtype (`torch.dtype`, *optional*): of the products that directions pass through; the model's own by default. What
            the model itself computes and the sum over layers are not rounded to it.

    Raises:
        UnsupportedError: the model is not written out here (no decoder-only language model of a known kind, something
            else than linear layers responds), or does not compute what is written out.
        TooLarge: what is kept of the batch would not fit.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, parameters: Parameters, objective: Objective, batch: Batch,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        head = output_layer(model, parameters, objective)
        layers = decoder_layers(model)
        if head is None or not layers or any(module.training for module in model.modules()):
            raise UnsupportedError(f"{type(model).__name__} is in training mode, or of no kind that is written out")
        self._parameters = parameters
        self._device = parameters.tensors(model)[0].device
        self.dtype = dtype or _own_type(model, parameters)
        self._linears = LinearJVPs(model, parameters, self.dtype)
        self._each = self._room(model, layers, batch)
        known = {path for layer in layers for path in layer.linears}
        strange = sorted(self._linears.responding - known)
        if strange:
            raise UnsupportedError(f"{strange[0]} responds and is in no layer that is written out")
        watched = {path for layer in layers for path in layer.watched}
        attentions = {layer.blocks[0].path for layer in layers}
        seen, norms, hidden = ActivationRecorder(), list[tuple[nn.Module, Tensor, Tensor]](), list[Tensor]()
        with fused_activations(model), watching(model, head, watched, attentions, seen, norms, hidden):
            logits, labels = Likelihood(model, objective)(batch)
        self.labels = labels
        if not hidden:
            raise UnsupportedError("the output layer was not called, or its hooks were not")
        hidden_gradients = hidden_state_gradients(head, hidden[-1], logits, labels)
        if hidden_gradients is None:
            raise UnsupportedError("between the last hidden state and the logits is more than one Linear layer")
        check_chain(layers, seen, norms, hidden[-1])
        error = norm_vjp(*norms[-1], hidden_gradients)
        if error is None:
            raise UnsupportedError("the last norm is not written out")
        self._error = error
        with fused_activations(model):
            self._points = [DecoderLayerJVP(model, layer, seen, self._linears) for layer in layers]

    def _room(self, model: nn.Module, layers: list[DecoderLayer], batch: Batch) -> int:
        """Bytes of the widest tangent of one direction: a projection's, or an attention's, between all positions.

        Raises:
            TooLarge: what is kept of the forward pass would not fit, with one attention's weights.
        """
        widths = [int(weight_matrix(model.get_submodule(path)).shape[0]) for layer in layers for path in layer.linears]
        tokens = 4 * batch["labels"].numel()
        heads = []
        for attention, _ in (layer.blocks for layer in layers):
            module: Any = model.get_submodule(attention.path)
            heads.append(int(weight_matrix(model.get_submodule(attention.output)).shape[1]) // module.head_dim)
        weights = tokens * max(heads) * batch["labels"].shape[1]
        limit = free_bytes(self._device) // 2 if self._device.type == "cuda" else _CPU_KEPT
        if _KEPT * (tokens * sum(widths) + weights) > limit:
            raise TooLarge(f"keeping a pass over {batch['labels'].numel()} tokens would take over {limit >> 20} MiB")
        return max(tokens * max(widths), weights)

    @torch.no_grad()
    def along(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """(queries, positions, k): derivatives along (k, P), in nats; zero where a position is not supervised.

        Raises:
            NumericalError: a derivative that is not finite.
        """
        if chunk is None:  # in even handfuls
            chunk = math.ceil(
                len(directions) / math.ceil(len(directions) / chunk_size(self._each, self._device, _CPU_CACHE))
            )
        with torch.autocast(self._device.type, enabled=False):
            parts = [self._block(directions[at : at + chunk]) for at in range(0, len(directions), chunk)]
        result = torch.cat(parts).permute(1, 2, 0)
        if not bool(torch.isfinite(result).all()):
            raise NumericalError("a derivative of the query's log-likelihood is not finite: is the model's own NaN?")
        return result

    def _block(self, directions: Tensor) -> Tensor:
        """(k, queries, positions)."""
        directions, factors = unit(directions)
        tangents = self._parameters.split(directions)
        moved = None
        for point in self._points:
            moved = point.push(moved, tangents)
        if moved is None:
            return torch.zeros(len(directions), *self.labels.shape, device=directions.device)
        found = torch.einsum("krtd,rtd->krt", moved[:, :, : self.labels.shape[1]], self._error.to(moved.dtype))
        return found * factors.to(found.dtype).view(-1, 1, 1)


def _own_type(model: nn.Module, parameters: Parameters) -> torch.dtype:
    """What the model's products are computed in."""
    weight = parameters.tensors(model)[0]
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
