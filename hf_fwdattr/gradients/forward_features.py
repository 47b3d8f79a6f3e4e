"""Features of a query: what one plain forward pass of any model shows of it.

For evenly spaced layers, the normalised hidden state averaged over output tokens; the error, summed over them; and for
evenly spaced tracked linear layers the sum over tokens of error x input, which is what their gradient would be if
the error at the model's output were that at their own. The error is the gradient of a label's log-likelihood by the
last hidden state, or by the logits where no plain output layer makes them. Wide vectors are folded into buckets with
random signs, always the same ones (count sketch: Charikar, Chen and Farach-Colton 2002).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.fsdp import is_sharded
from ..models.likelihood import IGNORED, Batch, Likelihood, Objective
from ..models.lora import linear_layout
from ..models.names import base_model
from ..models.output_head import find_output_layer, hidden_state_gradients, hidden_states, label_gradients
from ..models.parameters import TrackedParameters, is_linear


__all__ = ["ForwardFeatures"]

_LAYERS, _INPUTS = 7, 16  # layers whose hidden states, and tracked layers whose inputs are recorded, at most
_MEAN, _ERROR = 128, 256  # features of a hidden state and of the summed error, at most
_INPUT, _SKETCH = 16, 512  # buckets of an input, and features of its product with the error, at most
_SEED = 0x5EED
_TOLERANCE = 0.1  # of a row's features in its batch against those alone; bfloat16 differs by a few percent


class ForwardFeatures:
    """Computes features of queries; the model is in evaluation mode.

    Args:
        model (`nn.Module`): the model.
        parameters (`TrackedParameters`): its tracked parameters.
        objective (`Objective`): the likelihood.

    Attributes:
        group_sizes (`list[int]`): sizes of consecutive groups of features; known after the first batch.
        leading (`int`): groups before those of products of error and input, which are many numbers.

    Raises:
        UnsupportedError: the model is sharded, or has no layers to record.
    """

    def __init__(self, model: nn.Module, parameters: TrackedParameters, objective: Objective):
        if is_sharded(model):
            raise UnsupportedError(f"{type(model).__name__}: FSDP shards it, and features read whole output layers")
        self.model, self._likelihood = model, Likelihood(model, objective)
        self._per_token = objective.name.startswith("causal-lm")
        self._head = find_output_layer(model, objective)
        self._layers = _spread(_layer_paths(model), _LAYERS)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters.live)
        self._inputs = _spread([path for path in owners if is_linear(model.get_submodule(path))], _INPUTS)
        self._folds: dict[tuple[int, int, int], Tensor] = {}
        self._is_checked = False
        self.group_sizes: list[int] = []
        self.leading = 1 + len(self._layers)
        if not self._layers:
            raise UnsupportedError(f"{type(base_model(model)).__name__} has no list of layers, so it has no features")

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Run one forward pass over a batch of queries and return their features, (queries, F) float32, on the CPU.

        Raises:
            UnsupportedError: a layer's output has no entry for each row, it is unknown which of its positions are
                output tokens, or rows of a batch touch each other.
        """
        features = self._features(batch)
        rows = len(features)
        if not self._is_checked and rows > 1:
            self._is_checked = True
            alone = self._features({key: _first_row(value, rows) for key, value in batch.items()})[0]
            difference = float((alone - features[0]).norm())
            if not difference <= _TOLERANCE * float(features[0].norm()):
                raise UnsupportedError(
                    f"features of a row in its batch and alone: {difference:.3g} apart. Rows of a batch touch each "
                    "other, so no regression is right. Use gradient_predictor=False"
                )
        self.group_sizes = self._sizes
        return features

    def _features(self, batch: Batch) -> Tensor:
        with _recording(self.model, self._layers, self._inputs) as (outputs, inputs):
            error, labels = self._error(batch)
        total = error.sum(1)
        groups = [self._fold(total, _ERROR, 0)]
        for number, path in enumerate(self._layers, 1):
            hidden, counts = self._at_output_tokens(path, outputs.get(path), batch, labels)
            hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:]) * counts.unsqueeze(-1)
            groups.append(self._fold(_mean(hidden, counts), _MEAN, number))
        for number, path in enumerate(self._inputs, 1 + _LAYERS):
            x, counts = self._at_output_tokens(path, inputs.get(path), batch, labels)
            x = self._fold(x, _INPUT, number)
            width = max(1, _SKETCH // x.shape[-1])
            if x.shape[1] == error.shape[1]:
                product = torch.einsum("rta,rtb->rab", self._fold(error, width, 0), x)
            else:  # an encoder's positions are others than the error's
                product = torch.einsum("ra,rb->rab", self._fold(total, width, 0), _mean(x, counts))
            groups.append(product.flatten(1))
        self._sizes = [group.shape[1] for group in groups]
        return torch.cat(groups, 1).cpu()

    def _error(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model; return errors (rows, positions, d), float32 and 0 where labels are -100, and the labels."""
        gradients = None
        if self._head is not None and linear_layout(self._head) is not None:
            hidden, output, logits, labels = hidden_states(self._likelihood, self._head, batch)
            gradients = hidden_state_gradients(self._head, hidden, output, logits, labels)
        else:
            logits, labels = self._likelihood(batch)
        return (label_gradients(logits, labels) if gradients is None else gradients).float(), labels

    def _at_output_tokens(
        self, path: str, recorded: Tensor | None, batch: Batch, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a recording (rows, positions, features), float32, 0 elsewhere, and which positions count, 1 or 0."""
        if recorded is None or not recorded.is_floating_point() or recorded.ndim < 2 or len(recorded) != len(labels):
            raise UnsupportedError(
                f"{path}: not called on this batch, or without one entry for each row. Its features are unknown. Use "
                "gradient_predictor=False"
            )
        values = _positions_first(recorded)
        positions, counts = self._alignment(path, values.shape[1], batch, labels)
        return values[:, positions].float().masked_fill(counts.unsqueeze(-1) == 0, 0.0), counts

    def _alignment(self, path: str, length: int, batch: Batch, labels: Tensor) -> tuple[slice, Tensor]:
        """Return which of a layer's positions are those of the labels or of the text, and counts (rows, positions)."""
        count, virtual = labels.shape[1], _virtual_tokens(self.model)
        encodes = "encoder" in path.split(".") and getattr(self._config, "is_encoder_decoder", False)
        per_token = (count > 1 or self._per_token) and not encodes
        if per_token and length - virtual - count in (0, 1):
            return slice(virtual, virtual + count), (labels != IGNORED).float()
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == (len(labels), length):
            return slice(None), (mask != 0).to(labels.device).float()
        if per_token:
            raise UnsupportedError(
                f"positions of {path}: {length}. Labels have {count}, so it is unknown which of them are output "
                "tokens. Use gradient_predictor=False"
            )
        return slice(None), torch.ones(len(labels), length, device=labels.device)

    @property
    def _config(self) -> Any:
        return getattr(base_model(self.model), "config", None)

    def _fold(self, values: Tensor, width: int, number: int) -> Tensor:
        """Fold the last dimension into `width` buckets with random signs, unless it is no wider."""
        size = values.shape[-1]
        if size <= width:
            return values
        key = (number, width, size)
        if key not in self._folds:
            generator = torch.Generator().manual_seed(_SEED + 10_007 * number + width)
            order = torch.randperm(size, generator=generator)
            signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
            matrix = torch.zeros(size, width)
            matrix[order, torch.arange(size) % width] = signs.float()
            self._folds[key] = matrix.to(values.device)
        return values @ self._folds[key]


def _layer_paths(model: nn.Module) -> list[str]:
    """Return the paths of the elements of the outermost lists of modules; without lists, of linear layers."""
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = len(module)
    if lists:
        return [f"{path}.{index}" for path, count in lists.items() for index in range(count)]
    return [path for path, module in model.named_modules() if is_linear(module)]


def _spread(paths: Sequence[str], count: int) -> list[str]:
    """Return at most `count` of the paths, evenly spaced, with the last."""
    count = min(count, len(paths))
    return [paths[(index + 1) * len(paths) // count - 1] for index in range(count)]


@contextmanager
def _recording(
    model: nn.Module, layers: Sequence[str], owners: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Record the first tensor that each layer returns, and the input of each owner, of its last call."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def record(table: dict[str, Tensor], path: str, values: Any) -> None:
        first = values[0] if isinstance(values, tuple | list) and len(values) else values
        if isinstance(first, Tensor):
            table[path] = first.detach()

    def hook(path: str) -> Any:
        def both(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record(inputs, path, args)
            record(outputs, path, output)

        return both

    paths = dict.fromkeys([*layers, *owners])
    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield outputs, inputs
    finally:
        for handle in handles:
            handle.remove()


def _positions_first(values: Tensor) -> Tensor:
    """Return (rows, positions, features) of (rows, features), (rows, positions, features) or (rows, channels, ...)."""
    if values.ndim == 2:
        return values.unsqueeze(1)
    return values if values.ndim == 3 else values.flatten(2).transpose(1, 2)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean (rows, features) over the positions that count."""
    return values.sum(1) / counts.sum(1, keepdim=True).clamp(min=1.0)


def _virtual_tokens(model: nn.Module) -> int:
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


def _first_row(value: Any, rows: int) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
