"""Temporary states of a model: in evaluation mode and frozen, or with some parameters trainable."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import UnsupportedError
from .fsdp import reshard
from .interrupts import uninterrupted


__all__ = ["frozen", "refuse_batch_statistics", "trainable"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode with nothing trainable; modes and flags are always restored."""
    reshard(model)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        with uninterrupted():
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            if cache is not None:
                model.config.use_cache = cache  # type: ignore[union-attr]


@contextmanager
def trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Make parameters require gradients; their flags are always restored."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        with uninterrupted():
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)


def refuse_batch_statistics(model: nn.Module, training: bool = False) -> None:
    """Refuse batch norms that mix the rows of a batch.

    Args:
        training (`bool`): judge the mode that `model.train()` puts the model in, instead of the present one.

    Raises:
        UnsupportedError: a batch norm without running statistics, or in training mode; the message names it.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        if training:
            model.train()
        mixing = [
            (name, type(module).__name__)
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        ]
    finally:
        with uninterrupted():
            for module, mode in modes:
                module.training = mode
    if mixing:
        name, kind = mixing[0]
        raise UnsupportedError(
            f"{name} is a {kind} that normalises with the statistics of its batch. A row's loss then depends on other "
            "rows, and no row has a gradient of its own. Keep such layers in evaluation mode while training, or use "
            "layer or group norm"
        )
