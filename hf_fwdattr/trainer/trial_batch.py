"""Trial batch: a few rows go through everything that the passes will do, before the first training step."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AttributionError, NumericalError, UnsupportedError
from ..gradients.per_sample import PerSampleGradients
from ..gradients.predictor import GradientPredictor
from ..models.fsdp import is_shard, is_sharded
from ..models.likelihood import Batch
from ..models.modes import frozen
from .build_context import BuildContext
from .columns import texts_of
from .mode_check import refuse_other_training_mode


__all__ = ["refuse_failing_batch"]

_ROWS = 4  # rows in the trial batch, at most
_SCANNED = 32  # first rows among which those of the trial batch are chosen
_LARGEST_NOISE = 0.5  # of NEFTune, relative to the embeddings
# Largest change of a row's gradient with the rows beside it, relative to its norm, by the gradients' digits.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}


def refuse_failing_batch(context: BuildContext) -> str:
    """Take rows of different lengths through gradients, recording and texts as the passes will, and refuse failures.

    Model, weights and random states are left as they were. Under several processes every rank tries the same rows, and
    the caller raises a refusal of one on all. Of a sharded model, whose forward pass is a collective that a refusal
    in the middle would leave the others waiting in, only texts and noise are tried.

    Returns:
        Why rows' gradients cannot be captured in the training; empty if nothing stands in the way.

    Raises:
        AttributionError: what the passes would raise, or an UnsupportedError in place of any other error.
    """
    with _random_states(context):
        texts = texts_of(context.original, context.config.include_text, context.tokenizer)
        if texts is not None:
            next(texts, None)
        _refuse_large_noise(context)
        if is_sharded(context.model):
            return ""
        indices = _different_rows(context)
        _refuse_several_labels(context, indices)
        with frozen(context.model):
            try:
                obstacle = _check_gradients(context, indices)
                refuse_other_training_mode(context.model, context.objective, context.rows.batch(indices))
            except NumericalError:  # weights that are not finite: a training of its own, which ends without a bank
                return ""
            except (AttributionError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UnsupportedError(
                    f"per-row gradients of {type(context.model).__name__}: a batch of {len(indices)} rows fails with "
                    f"{type(error).__name__}: {_first_line(error)}. The bank could not be made after the training. "
                    "Track weights of other layers (ResponseConfig(parameters=...)), or set batch_size=1"
                ) from error
            _check_predictor(context, indices)
    return obstacle


def _refuse_several_labels(context: BuildContext, indices: list[int]) -> None:
    """Refuse labels of a classifier that are no class numbers.

    Raises:
        UnsupportedError: a classifier's loss with such labels is not the likelihood of one class.
    """
    labels = context.rows.batch(indices)["labels"]
    if context.objective.name == "sequence-classification" and labels.is_floating_point():
        raise UnsupportedError(
            f"labels: {labels.dtype}, of shape {tuple(labels.shape)} for {len(indices)} rows. A classifier takes them "
            "for several labels at once (or for a value to regress), and its loss is then not the likelihood of one "
            "class. Describe it by ResponseConfig(objective=...); hf_fwdattr/trainer/README.md does for several labels"
        )


def _refuse_large_noise(context: BuildContext) -> None:
    """Refuse NEFTune whose noise is not small beside the embeddings: responses are those of the network without it.

    Its components are uniform within alpha / sqrt(tokens x features) (Jain et al. 2023).

    Raises:
        UnsupportedError: the noise is more than half as large, which moves scores by more than a quarter.
    """
    for module in context.model.modules():
        alpha, weight = getattr(module, "neftune_noise_alpha", None), getattr(module, "weight", None)
        if not alpha or not isinstance(weight, Tensor) or is_shard(weight):
            continue
        lengths = [length for length in context.rows.lengths(list(range(min(_SCANNED, len(context.rows))))) if length]
        tokens = sum(lengths) / len(lengths) if lengths else 1.0
        size = float(weight.detach().float().square().mean().sqrt())
        noise = float(alpha) / (3.0 * tokens * weight.shape[1]) ** 0.5
        if noise > _LARGEST_NOISE * size:
            raise UnsupportedError(
                f"neftune_noise_alpha={alpha:g}: its noise is {noise / max(size, 1e-12):.2g} times as large as the "
                "embeddings. Responses are those of the network without noise, and scores would be far off. Set at "
                f"most {0.95 * _LARGEST_NOISE * size / noise * float(alpha):.2g}, or none"
            )


def _check_gradients(context: BuildContext, indices: list[int]) -> str:
    """Compare every row's gradient in a batch with that of the row collated alone.

    Returns:
        Why gradients cannot be captured, as far as calls of the layers show it.

    Raises:
        UnsupportedError: a row's gradient depends on the rows beside it, padding included.
    """
    gradients = PerSampleGradients(context.model, context.parameters, context.objective)
    batch = context.rows.batch(indices)
    together, _ = gradients(batch)
    obstacle = gradients.obstacle
    if len(indices) == 1 or gradients.is_half or context.rows.batch_size == 1:
        return obstacle
    for row, index in enumerate(indices):
        alone, _ = gradients(context.rows.batch([index]))
        difference = float(_differences(together[row : row + 1], alone))
        if difference > _TOLERANCE[alone.dtype]:
            every = torch.cat([gradients(context.rows.batch([one]))[0] for one in indices])
            cure = _padding_cure(batch, gradients, together, every)
            raise UnsupportedError(
                f"row {index}: its gradient in a batch of {len(indices)} rows differs from its gradient alone by "
                f"{difference:.1%}, so it depends on the rows beside it. Padding moves it (on the left with learned "
                "positions or with a label on a row's first token, on the right where the last token is read, or "
                f"without an attention_mask), or rows influence each other. {cure}"
            )
    return obstacle


def _differences(one: Tensor, other: Tensor) -> Tensor:
    """Return the distance of each row's two gradients relative to the larger, (rows,); 0 where both are nothing."""
    scales = torch.maximum(one.norm(dim=1), other.norm(dim=1))
    return (one - other).norm(dim=1) / scales.clamp(min=1e-12) * (scales > 1e-9)


def _padding_cure(batch: Batch, gradients: PerSampleGradients, together: Tensor, alone: Tensor) -> str:
    """Return a cure for rows that padding changes, tried on this batch.

    Args:
        batch (`dict`): the rows as they were collated.
        gradients (`PerSampleGradients`): of the model.
        together (`Tensor`): (rows, P) gradients of the rows in the batch.
        alone (`Tensor`): (rows, P) gradients of the rows without padding.
    """
    mask, tolerance = batch.get("attention_mask"), _TOLERANCE[alone.dtype]
    if mask is None:
        return "Use a collator that returns an attention_mask, or pad all rows to one length"
    for side in ("right", "left") if mask.ndim == 2 else ():
        moved = {name: _moved(value, mask, side) for name, value in batch.items()}
        if float(_differences(gradients(moved)[0], alone).max()) <= tolerance:
            return f"Pad on the {side}: tokenizer.padding_side={side!r}"
    single = [
        {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
        for row in range(len(alone))
    ]
    padded = torch.cat([gradients(one)[0] for one in single])
    if float(_differences(together, padded).max()) <= tolerance:
        return "Pad all rows to one length, or train and respond with batch_size=1"
    return "Train and respond with batch_size=1"


def _moved(value: Any, mask: Tensor, side: str) -> Any:
    """Return a tensor of tokens (rows, tokens, ...) with its padding on one side; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
        return value
    order = (mask != 0).to(torch.int8).argsort(dim=1, stable=True, descending=side == "right")
    return torch.stack([row[positions] for row, positions in zip(value, order, strict=True)])


def _check_predictor(context: BuildContext, indices: list[int]) -> None:
    """Record a batch as the gradient predictor will; a model that has none is left to the passes.

    Raises:
        UnsupportedError: recording fails with an error that the passes do not expect.
    """
    if not context.keeps_predictor:
        return
    try:
        GradientPredictor(context.model, context.parameters, context.objective).try_batch(context.rows.batch(indices))
    except AttributionError:
        return
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"gradient_predictor=True: recording the layers of {type(context.model).__name__} fails with "
            f"{type(error).__name__}: {_first_line(error)}. The bank could not be made after the training. Set "
            "ResponseConfig(gradient_predictor=False)"
        ) from error


def _different_rows(context: BuildContext) -> list[int]:
    """Return a few of the first rows, with the shortest and the longest of them among them."""
    rows = context.rows
    first = list(range(min(_SCANNED, len(rows))))
    by_length = sorted(first, key=rows.lengths(first).__getitem__)
    count = min(_ROWS, rows.batch_size, len(first))
    chosen = [by_length[0], *by_length[len(by_length) - count + 1 :]] if count > 1 else by_length[-1:]
    return sorted(set(chosen))


@contextmanager
def _random_states(context: BuildContext) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python."""
    device = context.parameters.tensors(context.model)[0].device
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
