"""One recorded forward pass of a causal language model, and the error at its end."""

from dataclasses import dataclass

from torch import Tensor

from .activations import ActivationRecorder


__all__ = ["RecordedPass"]


@dataclass(frozen=True)
class RecordedPass:
    """One recorded forward pass.

    Attributes:
        logits (`Tensor`): (rows, positions, classes).
        labels (`Tensor`): (rows, positions), -100 where a position is not supervised.
        error (`Tensor`): (rows, positions, d) gradient of each supervised token's log-likelihood by its last residual
            state, before the final norm; zero at other positions.
    """

    recorder: ActivationRecorder
    logits: Tensor
    labels: Tensor
    error: Tensor
