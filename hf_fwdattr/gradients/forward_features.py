"""Features of queries for regressions of their derivatives: what one plain forward pass of any model shows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.likelihood import IGNORED, Batch, Likelihood, Objective
from ..models.names import base_model
from ..models.output_head import find_output_layer, hidden_state_gradients, hidden_states, logit_gradients


__all__ = ["ForwardFeatures"]

_ROW_TOLERANCE = 0.1  # of a row's features in its batch against those alone; bfloat16 differs by a few percent


class ForwardFeatures:
    """Computes features of queries, (queries, F) float32; the model is in evaluation mode.

    For about `layers` evenly spaced layers: the normalised hidden state averaged over output tokens, and a sketch of
    Σ_t error_t ⊗ hidden_t; then the summed error Σ_t error_t. Errors are gradients of each label's log-likelihood by
    the last hidden state, or by the logits where no plain output layer makes them. Wide vectors are folded into
    buckets with random signs (count sketch: Charikar, Chen and Farach-Colton 2002), which seeds determine.

    Args:
        layers (`int`): how many layers are recorded.
        width (`int`): most features of a hidden state or of the error.
        sketch (`int`): side of a sketch, which has at most sketch² features.

    Attributes:
        group_sizes (`list[int]`): sizes of consecutive groups of features, for `DerivativeRegression.fit`; known after
            the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        layers: int = 7,
        width: int = 512,
        sketch: int = 20,
        seed: int = 0,
    ):
        self.model, self.objective = model, objective
        self.group_sizes: list[int] = []
        self._layers, self._width, self._sketch, self._seed = layers, width, sketch, seed
        self._head = find_output_layer(model, objective)
        self._likelihood = Likelihood(model, objective)
        self._candidates = _candidates(model)
        self._has_chosen = False

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Run one forward pass over a batch of queries and return their features.

        Raises:
            UnsupportedError: no layer's output has the batch's rows, it is unknown which tokens belong to a layer's
                positions, rows of a batch touch each other, or the features differ from those of the first batch.
        """
        if self._has_chosen:
            features, sizes = self._features(batch)
        else:
            features, sizes = self._first(batch)
        if self.group_sizes and sizes != self.group_sizes:
            raise UnsupportedError(
                f"features of this batch: {sizes}. Those of the first batch were {self.group_sizes}, so a regression "
                "cannot read them. Use a model whose layers do not depend on the batch"
            )
        self.group_sizes = sizes
        return features

    def _first(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Choose layers among those that this batch reaches, and compare a row in the batch with the row alone."""
        with _recording(self._candidates) as outputs:
            _, labels = self._likelihood(batch)
        rows = len(labels)
        reached = [path for path in self._candidates if path in outputs and _is_hidden(outputs[path], rows)]
        if not reached:
            raise UnsupportedError(
                f"layers of {type(base_model(self.model)).__name__} whose output has one entry per row: none. Without "
                "them there are no features. Use gradient_predictor=False"
            )
        count = min(self._layers, len(reached))
        chosen = {reached[(index + 1) * len(reached) // count - 1] for index in range(count)}
        self._candidates = {path: module for path, module in self._candidates.items() if path in chosen}
        features, sizes = self._features(batch)
        if rows > 1:
            alone, _ = self._features({key: _first_row(value, rows) for key, value in batch.items()})
            difference = float((alone[0] - features[0]).norm())
            if not difference <= _ROW_TOLERANCE * float(features[0].norm()):
                raise UnsupportedError(
                    f"features of a row in its batch and alone: {difference:.3g} apart. Rows of a batch touch each "
                    "other, so no regression is right. Use gradient_predictor=False"
                )
        self._has_chosen = True
        return features, sizes

    def _features(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """Return features and the sizes of their groups."""
        with _recording(self._candidates) as outputs:
            error, labels = self._error(batch)
        total = error.sum(1)
        groups = []
        for path in self._candidates:
            if path not in outputs or not _is_hidden(outputs[path], len(labels)):
                raise UnsupportedError(
                    f"output of {path}: missing in this batch, or without one entry per row. The first batch had it. "
                    "Use a model whose layers do not depend on the batch"
                )
            hidden = _positions_last(outputs[path])
            aligned, weights = self._alignment(path, hidden.shape[1], batch, labels)
            hidden = hidden[:, aligned].masked_fill(weights.unsqueeze(-1) == 0, 0.0).float()
            hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:]) * weights.unsqueeze(-1)
            mean = hidden.sum(1) / weights.sum(1, keepdim=True).clamp(min=1.0)
            groups.append(self._fold(mean, self._width, path))
            folded = self._fold(hidden, self._sketch, path)
            if hidden.shape[1] == error.shape[1]:
                outer = torch.einsum("rta,rtb->rab", self._fold(error, self._sketch, "error"), folded)
            else:  # other positions than the error's, as of an encoder
                outer = torch.einsum(
                    "ra,rb->rab", self._fold(total, self._sketch, "error"), self._fold(mean, self._sketch, path)
                )
            groups.append(outer.flatten(1))
        groups.append(self._fold(total, self._width, "error"))
        return torch.cat(groups, 1), [group.shape[1] for group in groups]

    def _error(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model and return (rows, positions, d) float32 errors, 0 where labels are -100, and the labels."""
        gradients = None
        if self._head is not None:
            hidden, output, logits, labels = hidden_states(self._likelihood, self._head, batch)
            gradients = hidden_state_gradients(self._head, hidden, output, logits, labels)
        else:
            logits, labels = self._likelihood(batch)
        if gradients is None:
            doubt, others = logit_gradients(logits, labels)
            label = labels.clamp(min=0).unsqueeze(-1)
            gradients = (-others * doubt).scatter_add(-1, label, doubt)
            gradients = gradients.masked_fill((labels == IGNORED).unsqueeze(-1), 0.0)
        return gradients.float(), labels

    def _alignment(self, path: str, length: int, batch: Batch, labels: Tensor) -> tuple[slice, Tensor]:
        """Return which of a layer's positions count, and their weights (rows, positions): 1 or 0."""
        inner, count = base_model(self.model), labels.shape[1]
        peft = getattr(self.model, "active_peft_config", None)
        virtual = getattr(peft, "num_virtual_tokens", None) or 0
        is_encoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False)) and (
            "encoder" in path.split(".")
        )
        per_token = count > 1 or self.objective.name.startswith("causal-lm")
        if per_token and not is_encoder and length - virtual - count in (0, 1):
            return slice(virtual, virtual + count), (labels != IGNORED).float()
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == (len(labels), length):
            return slice(None), (mask != 0).to(labels.device).float()
        if per_token and not is_encoder:
            raise UnsupportedError(
                f"positions of {path}: {length}. Labels have {count}, so it is unknown which of them are output "
                "tokens. Use gradient_predictor=False"
            )
        return slice(None), torch.ones(len(labels), length, device=labels.device)

    def _fold(self, values: Tensor, width: int, name: str) -> Tensor:
        """Fold the last dimension into `width` buckets with random signs, unless it is no wider."""
        size = values.shape[-1]
        if size <= width:
            return values
        place = 0 if name == "error" else 1 + list(self._candidates).index(name)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + place * 10_007 + width)
        order = torch.randperm(size, generator=generator).to(values.device)
        signs = (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(values)
        padded = nn.functional.pad(values[..., order] * signs, (0, -size % width))
        return padded.unflatten(-1, (-1, width)).sum(-2)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return elements of the outermost lists of modules by path; without lists, modules that own parameters."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = module
    found = {f"{path}.{index}": layer for path, layers in lists.items() for index, layer in enumerate(layers)}
    if found:
        return found
    return {path: module for path, module in model.named_modules() if len(list(module.parameters(recurse=False)))}


@contextmanager
def _recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the first tensor that each module returns, of its last call."""
    outputs: dict[str, Tensor] = {}

    def record(path: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and len(output) else output
        if isinstance(first, Tensor):
            outputs[path] = first.detach()

    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: record(path, output))
        for path, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _is_hidden(output: Tensor, rows: int) -> bool:
    """Return whether an output is a float tensor of (rows, ..., features)."""
    return output.is_floating_point() and output.ndim >= 2 and len(output) == rows


def _positions_last(output: Tensor) -> Tensor:
    """Return (rows, positions, features) of (rows, features), (rows, positions, features) or (rows, channels, ...)."""
    if output.ndim == 2:
        return output.unsqueeze(1)
    return output if output.ndim == 3 else output.flatten(2).transpose(1, 2)


def _first_row(value: Any, rows: int) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
