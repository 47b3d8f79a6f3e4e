"""Training mode: layers that draw at random, or compute something else, while they train; dropout aside.

Responses are those of the network in evaluation mode. Dropout makes training noisy around it; a router that samples
its experts (PhiMoE) trains other networks altogether.
"""

import pickle
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.interrupts import uninterrupted
from ..models.likelihood import IGNORED, Batch, Objective
from ..models.names import base_model


__all__ = ["refuse_other_training_mode"]

_LARGEST_CHANGE = 0.02  # of a position's logits, relative to their spread
_DRAWS = 3  # passes in training mode
_DROPPING = re.compile(r"drop|neftune_noise_alpha")  # settings of noise that is small or checked elsewhere


@torch.no_grad()
def refuse_other_training_mode(model: nn.Module, objective: Objective, batch: Batch) -> None:
    """Compare a batch's logits in evaluation mode with those in training mode without dropout.

    Two forward passes, and two more where layers draw random numbers.

    Args:
        model (`nn.Module`): in evaluation mode, and left so.

    Raises:
        UnsupportedError: the logits at some position differ by more than 2 % in one of the passes.
    """
    plain, labels = objective.forward(model, batch)
    with _training_without_dropout(model):
        before = _generator_states()
        draws = [objective.forward(model, batch)[0]]
        if _generator_states() != before:  # else nothing was drawn, and further passes are the same
            draws += [objective.forward(model, batch)[0] for _ in range(_DRAWS - 1)]
    supervised = labels != IGNORED
    if draws[0].shape != plain.shape or not bool(supervised.any()):
        return
    change = max(_largest_change(plain[supervised], trained[supervised]) for trained in draws)
    if change > _LARGEST_CHANGE:
        raise UnsupportedError(
            f"{type(base_model(model)).__name__}: in training mode its logits differ by {change:.0%} from those in "
            "evaluation mode, with dropout off. Layers that draw at random while they train (a router's jitter noise, "
            "sampled experts) train other networks than the one that is attributed. Set their noise to 0, such as "
            "model.config.router_jitter_noise before the model is made"
        )


def _generator_states() -> tuple[bytes, ...]:
    """Return the states of the generators that layers draw from, to be compared: of processor, GPUs, NumPy, Python."""
    tensors = [torch.get_rng_state()]
    if torch.cuda.is_available():
        tensors += torch.cuda.get_rng_state_all()
    others = pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())
    return (*others, *(tensor.numpy().tobytes() for tensor in tensors))


def _largest_change(plain: Tensor, trained: Tensor) -> float:
    """Return the largest change of logits (positions, classes) relative to their spread at the position."""
    plain, trained = plain.float(), trained.float()
    spread = (plain - plain.mean(-1, keepdim=True)).norm(dim=-1)
    spread = torch.maximum(spread, 1e-2 * plain.norm(dim=-1)).clamp(min=1e-6)
    return float(((trained - plain).norm(dim=-1) / spread).amax())


@contextmanager
def _training_without_dropout(model: nn.Module) -> Iterator[None]:
    """Put the model into training mode with every probability of dropping something at 0; all is restored."""
    modes = [(module, module.training) for module in model.modules()]
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "__dict__"):
            owners[id(config)] = config
    kept = [(owner, name, value) for owner in owners.values() for name, value in _probabilities(owner)]
    try:
        for owner, name, _ in kept:
            vars(owner)[name] = 0.0
        model.train()
        yield
    finally:
        with uninterrupted():
            for module, mode in modes:
                module.training = mode
            for owner, name, value in kept:
                vars(owner)[name] = value


def _probabilities(owner: Any) -> list[tuple[str, float]]:
    is_dropout = "Drop" in type(owner).__name__
    return [
        (name, value)
        for name, value in vars(owner).items()
        if isinstance(value, float) and value and (_DROPPING.search(name) or (is_dropout and name == "p"))
    ]
