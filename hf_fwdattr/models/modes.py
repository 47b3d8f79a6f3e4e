"""Per-row gradients of summed losses, (rows, P), in one backward pass for a whole batch.

A Linear's gradient is the product of what went in and what comes back, so a hook gives every row's own gradient; LoRA
matrices are Linears, whatever the architecture around them. Any other weight goes through `vmap` over single rows. The
first batch is checked against plain autograd on one row alone: a model in which rows touch each other is refused.
Where a Linear sees rows and positions in one dimension, every batch is checked, as their order may change unnoticed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import UnsupportedError
from .fsdp import reshard


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with nothing trainable; modes and flags are restored, whatever happens."""
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
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if cache is not None:
            model.config.use_cache = cache  # type: ignore[union-attr]


@contextmanager
def trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters that require gradients for a while."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def refuse_batch_statistics(model: nn.Module, training: bool = False) -> None:
    """Refuse batch norms that mix the rows of a batch.

    Args:
        training (`bool`): look at the mode in which `model.train()` puts the model, instead of the present one.

    Raises:
        UnsupportedError: names the layer. With kept running statistics a batch norm does not mix rows.
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
        for module, mode in modes:
            module.training = mode
    if mixing:
        name, kind = mixing[0]
        raise UnsupportedError(
            f"{name} is a {kind} that normalises with the statistics of its batch: there a row's loss depends on the "
            "rows beside it, so no row has a gradient of its own. Keep such layers in evaluation mode while training, "
            "or use layer or group norm"
        )
