"""What gradient clipping multiplied a step's gradient with, seen where Accelerate does it."""

from typing import Any

from torch import nn

from ..errors import UnsupportedError


class Clipping:
    """Stands in for an accelerator's `clip_grad_norm_`, which it calls, until detached.

    Args:
        accelerator (`Accelerator`): the training loop's.
        parameters (`list[nn.Parameter]`): the responding ones; clipping that leaves them out does not concern us.
    """

    def __init__(self, accelerator: Any, parameters: list[nn.Parameter]):
        self.accelerator = accelerator
        self.responding = {id(parameter) for parameter in parameters}
        self._norm, self._value = accelerator.clip_grad_norm_, accelerator.clip_grad_value_
        self.factor: Any = 1.0
        accelerator.clip_grad_norm_, accelerator.clip_grad_value_ = self._clip, self._refuse

    def detach(self) -> None:
        """Put Accelerate's own methods back."""
        del self.accelerator.clip_grad_norm_, self.accelerator.clip_grad_value_

    def take(self) -> Any:
        """The factor since the last call, at most 1: a number, or a tensor on the gradients' device."""
        factor, self.factor = self.factor, 1.0
        return factor

    def _clip(self, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        norm = self._norm(parameters, max_norm, *args, **kwargs)
        clipped = self.responding & {id(parameter) for parameter in parameters}
        if clipped and clipped != self.responding:
            raise UnsupportedError("some responding parameters are clipped apart from others; clip them together")
        if clipped and norm is not None:
            full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self.factor = self.factor * (max_norm / (full + 1e-6)).clamp(max=1.0)  # as torch clips
        return norm

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("clip_grad_value_ bends gradients row by row; use clip_grad_norm_")
