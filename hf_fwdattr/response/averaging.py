"""Where a run counts as having ended: where it did, or after any of its segments.

At the end of a long run a query's gradient is small and mostly this run's own: another order of batches ends
elsewhere. What the run did to a query on its way is shared by more runs. With `mean` a response is the mean of the
responses after each of the S segments, (r_1 + ... + r_S) / S, and queries are read at the mean of the segments'
weights, as if the run could have ended after any of them. It agrees better with retraining in other orders, at no
forward pass more; scores are then no longer changes of the final model, and come out smaller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .segment import Segment


def shares(averaging: str, segments: int) -> list[float]:
    """(segments,) weight of each end in a response; they sum to one.

    Raises:
        ValueError: `averaging` is neither `none` nor `trajectory`.
    """
    if averaging not in ("none", "trajectory"):
        raise ValueError(f"averaging={averaging!r}: 'none' or 'trajectory'")
    return [1.0 / segments] * segments if averaging == "trajectory" else [0.0] * (segments - 1) + [1.0]


def weights_read(averaging: str, segments: Sequence[Segment], end: Tensor) -> Tensor:
    """(P,) responding parameters at which queries are read: those at the end, or the mean of the segments' middles."""
    return end if averaging == "none" else torch.stack([segment.theta for segment in segments]).mean(0)
