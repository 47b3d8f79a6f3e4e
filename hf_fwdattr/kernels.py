"""Layers whose kernels know no derivative and do not say so: what goes through them comes out as zero."""

import torch
from torch import nn

from .errors import UnsupportedError


def _quantised(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of bitsandbytes with their names."""
    return [item for item in model.named_modules() if type(item[1]).__module__.startswith("bitsandbytes")]


def refuse_silent_backward(model: nn.Module) -> None:
    """Refuse layers through which gradients vanish without a word.

    Raises:
        UnsupportedError: bitsandbytes on a CPU, whose kernels of evaluation mode know no derivative.
    """
    for name, module in _quantised(model):
        if getattr(getattr(module, "weight", None), "device", None) == torch.device("cpu"):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__} of bitsandbytes on a CPU, where it gives no gradients in "
                "evaluation mode: every response would be zero. Load the base model without quantisation"
            )


def refuse_silent_tangents(model: nn.Module) -> None:
    """Refuse layers through which forward-mode derivatives vanish, or may, without a word.

    Seen with bitsandbytes 0.50 on a CPU: 4-bit layers gave tangents of zero, and so readouts that were off by most of
    their size; 8-bit ones raise an error of their own. On a GPU some of its kernels are called in the same way.

    Raises:
        UnsupportedError: names the first such layer.
    """
    for name, module in _quantised(model):
        raise UnsupportedError(
            f"{name} is a {type(module).__name__} of bitsandbytes, whose kernels have no forward-mode derivative and "
            "would give wrong scores in silence; use readout='difference', or load the base without quantisation "
            "(`model.dequantize()`)"
        )
