"""Gradient clipping: the factor by which each step's gradient was scaled, measured where Accelerate clips."""

from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .guard import Guard
from .patching import Patches


__all__ = ["ClippingRecorder"]


class ClippingRecorder:
    """Stand-in for an accelerator's clipping methods that measures the factor.

    Args:
        accelerator (`Accelerator`): the training loop's; its methods are called and patched.
        parameters (`list[nn.Parameter]`): the tracked parameters; clipping of other parameters is ignored.
        patches (`Patches`): undo the patch.
        guard (`Guard`, *optional*): keeps errors once training has begun.
    """

    def __init__(self, accelerator: Any, parameters: list[nn.Parameter], patches: Patches, guard: Guard | None = None):
        self._guard = guard or Guard()
        self.tracked = {id(parameter) for parameter in parameters}
        self.factor: Any = 1.0
        self._clip_grad_norm, self._clip_grad_value = accelerator.clip_grad_norm_, accelerator.clip_grad_value_
        patches.replace(accelerator, clip_grad_norm_=self._clip, clip_grad_value_=self._clip_value)

    def take(self) -> Any:
        """Return the factor since the last call, at most 1: a number, or a tensor on the gradients' device."""
        factor, self.factor = self.factor, 1.0
        return factor

    def _clip(self, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        norm = self._clip_grad_norm(parameters, max_norm, *args, **kwargs)
        with self._guard():
            self._record(parameters, max_norm, norm)
        return norm

    def _record(self, parameters: list[nn.Parameter], max_norm: float, norm: Any) -> None:
        """Record the factor that this norm leads to."""
        clipped = self.tracked & {id(parameter) for parameter in parameters}
        if clipped and clipped != self.tracked:
            raise UnsupportedError(
                f"clip_grad_norm_: {len(clipped)} of {len(self.tracked)} tracked parameters. Parameters that are "
                "clipped apart from others have no common factor. Clip them together"
            )
        if clipped and norm is not None:
            full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self.factor = self.factor * (max_norm / (full + 1e-6)).clamp(max=1.0)  # as torch clips

    def _clip_value(self, *args: Any, **kwargs: Any) -> Any:
        self._guard.refuse(
            UnsupportedError(
                "clip_grad_value_: it clips each component of the gradient by itself, which no row's share survives. "
                "Use clip_grad_norm_"
            )
        )
        return self._clip_grad_value(*args, **kwargs)
