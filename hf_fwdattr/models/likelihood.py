"""The log-likelihood that is attributed: from a model and a batch, per row and per supervised position."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .fsdp import is_sharded
from .functional import call_with_weights
from .modes import frozen
from .names import base_model


__all__ = [
    "CAUSAL_LM", "IGNORED", "OBJECTIVE_NAMES", "SEQUENCE_CLASSIFICATION", "UNSHIFTED_CAUSAL_LM", "Batch", "Likelihood",
    "Objective", "log_probabilities", "resolve_objective", "row_losses", "sample_labels",
]  # fmt: skip

IGNORED = -100  # the label of a position that is not supervised, as everywhere in transformers
_SAMPLING_CHUNK = 1 << 19  # probabilities in float64 at a time while labels are sampled: they fit a CPU's caches
Batch = Mapping[str, Any]
OBJECTIVE_NAMES = ("causal-lm", "causal-lm-unshifted", "sequence-classification", "custom")


@dataclass(frozen=True)
class Objective:
    """A softmax likelihood over positions.

    Attributes:
        name (`str`): `causal-lm`, `causal-lm-unshifted`, `sequence-classification` or `custom`.
        forward (`Callable`): (model, batch) -> logits (rows, positions, classes) and labels (rows, positions), already
            aligned: the label at a position is what the logits at that position predict, or -100.
    """

    name: str
    forward: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVE_NAMES:
            raise ValueError(
                f"Objective: {self.name!r} is no known name, and no bank could be opened. Call your own 'custom'"
            )

    @property
    def shifts_labels(self) -> bool:
        """True if logits are compared with the label of the next position, so that a row's first label is unused."""
        return self.name == "causal-lm"


def _causal_lm(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits, labels = _unshifted_causal_lm(model, batch)
    return logits[:, :-1], labels[:, 1:]


def _unshifted_causal_lm(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    # Prompt tuning puts virtual tokens before a row's own, and their logits have no labels.
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    extra = logits.shape[1] - batch["labels"].shape[1]
    if extra not in (0, virtual):
        raise UnsupportedError(
            f"the logits of {type(base_model(model)).__name__} have {logits.shape[1]} positions and the labels "
            f"{batch['labels'].shape[1]}, so it is unknown which label belongs where. Pass "
            "ResponseConfig(objective=...), a function (model, batch) -> (logits, labels)"
        )
    return logits[:, extra:], batch["labels"]


def _sequence_classification(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs).logits.unsqueeze(1), batch["labels"].reshape(-1, 1)


CAUSAL_LM = Objective("causal-lm", _causal_lm)
# The loss of some models (BartForCausalLM) compares a position's logits with the label at that very position.
UNSHIFTED_CAUSAL_LM = Objective("causal-lm-unshifted", _unshifted_causal_lm)
SEQUENCE_CLASSIFICATION = Objective("sequence-classification", _sequence_classification)


def resolve_objective(model: nn.Module, choice: "str | Objective | Callable" = "auto") -> Objective:
    """Return the objective called `choice`; `auto` chooses by the model's class name.

    Raises:
        UnsupportedError: no known likelihood fits this kind of model.
    """
    if isinstance(choice, Objective):
        return choice
    if callable(choice):
        return Objective("custom", choice)
    known = (CAUSAL_LM, UNSHIFTED_CAUSAL_LM, SEQUENCE_CLASSIFICATION)
    objectives = {objective.name: objective for objective in known}
    if choice in objectives:
        return objectives[choice]
    inner = base_model(model)
    config, kind = getattr(inner, "config", None), type(inner).__name__
    if choice == "auto" and _is_causal(kind, config):
        return CAUSAL_LM if _shifts(inner) else UNSHIFTED_CAUSAL_LM
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    per_row = kind.endswith("Classification") and not kind.endswith("TokenClassification")
    if choice == "auto" and per_row and single and getattr(config, "num_labels", 0) > 1:
        return SEQUENCE_CLASSIFICATION
    raise UnsupportedError(
        f"objective={choice!r} fits no known likelihood of a {kind}; pass objective='causal-lm', "
        "'sequence-classification', or a function (model, batch) -> (logits, labels)"
    )


def _is_causal(kind: str, config: Any) -> bool:
    """Return whether a class is a causal language model, by its name; models of images and text among them."""
    if kind.endswith("ForConditionalGeneration"):
        return not getattr(config, "is_encoder_decoder", False)
    return kind.endswith(("ForCausalLM", "LMHeadModel", "WithLMHead")) or kind == "BertGenerationDecoder"


def _shifts(model: nn.Module) -> bool:
    """Return whether a causal language model's own loss predicts the next label: by its value on three tokens.

    Losses of transformers' `loss_function` do, and are not tried; so do models that cannot be tried.
    """
    with suppress(OSError, TypeError):
        if "loss_function(" in inspect.getsource(type(model).forward):
            return True
    if is_sharded(model):
        return True
    tokens = torch.tensor([[3, 1, 2]], device=next(model.parameters()).device)
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    with torch.no_grad(), frozen(model), torch.random.fork_rng(devices=devices):
        try:
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
            loss, logits = float(output.loss), output.logits.float()
        except Exception:  # it needs other inputs than tokens
            return True
    shifted = float(row_losses(logits[:, :-1], tokens[:, 1:]) / 2)
    plain = float(row_losses(logits, tokens) / 3)
    return abs(loss - shifted) <= abs(loss - plain)


class Likelihood(nn.Module):
    """The objective's forward as a module, so that [`call_with_weights`] can replace the model's weights."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective
        self.training = model.training

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.objective.forward(self.model, batch)

    def at(self, weights: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and labels with the weights of these live names replaced."""
        return call_with_weights(self, {f"model.{name}": weight for name, weight in weights.items()}, batch)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each label's log-likelihood in nats, (rows, positions), 0 where the label is -100; float32 or float64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = wide.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)
    return chosen.masked_fill(labels == IGNORED, 0.0)


def row_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the l_i of the formulas: negative log-likelihoods summed over supervised positions, (rows,), nats.

    With label smoothing, (1 - smoothing) times that and smoothing times the mean over all classes, as in
    transformers' `LabelSmoother`. Curvature does not change: a softmax's Gauss-Newton matrix is free of labels.
    """
    losses = -log_probabilities(logits, labels).sum(1)
    if not smoothing:
        return losses
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mean = (wide.logsumexp(-1) - wide.mean(-1)).masked_fill(labels == IGNORED, 0.0).sum(1)
    return (1.0 - smoothing) * losses + smoothing * mean


def sample_labels(logits: Tensor, labels: Tensor, uniforms: Tensor) -> Tensor:
    """Sample labels from the model, for the Gauss-Newton matrix: (rows, positions), -100 where `labels` are.

    The inverse distribution function is applied to `uniforms` (rows, positions) in [0, 1), so that a row's sample
    depends on the row and the seed and not on its batch. A few positions at a time, as a second copy of all logits
    would not fit.
    """
    sampled = torch.full_like(labels, IGNORED)
    supervised = (labels != IGNORED).nonzero()
    for part in supervised.split(max(1, _SAMPLING_CHUNK // logits.shape[-1])):
        at = part.unbind(1)
        cumulative = logits.detach()[at].double().softmax(-1).cumsum(-1)
        scaled = uniforms[at].to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, scaled, right=True).squeeze(-1)
        sampled[at] = chosen.clamp(max=logits.shape[-1] - 1).to(sampled)
    return sampled
