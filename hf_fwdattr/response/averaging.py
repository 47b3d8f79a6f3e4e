"""Trajectory averaging: responses and query weights at the end of a run, or averaged over its segments.

At the end of a long run a query's gradient is small and mostly this run's own: another order of batches ends
elsewhere. What the run did to a query on its way is shared by more runs. With `trajectory` a response is the mean of
the responses after each of the S segments, (r_1 + ... + r_S) / S, and queries are read at the mean of the segments'
weights, as if the run could have ended after any of them. Scores then agree better with retraining in other orders,
at no further forward pass; they are no longer changes of the final model, and smaller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .segment import Segment


__all__ = ["query_theta", "segment_weights"]


def segment_weights(averaging: str, segments: int) -> list[float]:
    """Return the weight of the responses after each segment, (segments,); the weights sum to one.

    Raises:
        ValueError: `averaging` is neither `none` nor `trajectory`.
    """
    if averaging not in ("none", "trajectory"):
        raise ValueError(f"averaging={averaging!r}: it must be 'none' or 'trajectory'")
    return [1.0 / segments] * segments if averaging == "trajectory" else [0.0] * (segments - 1) + [1.0]


def query_theta(averaging: str, segments: Sequence[Segment], end: Tensor) -> Tensor:
    """Return the tracked parameters (P,) at which queries are read: `end`, or the mean of the segments' snapshots."""
    return end if averaging == "none" else torch.stack([segment.theta for segment in segments]).mean(0)
