"""Leave-one-out along one trajectory: train again with the same seed and order, one row's weight zero.

What a score promises is exactly this change, to first order, in nats. Leaving a row out with another order of batches
measures the order more than the row (every method is near zero there), and is not what a score says.
"""

import torch
from torch import Tensor

from .agreement import Agreement, agreement


def without_rows(rows: int, left_out: Tensor) -> Tensor:
    """(left out + 1, rows) float weights for `retrain`: first all ones, then one line per row with a zero in it."""
    weights = torch.ones(len(left_out) + 1, rows)
    weights[torch.arange(1, len(left_out) + 1), left_out] = 0.0
    return weights


def loo(scores: Tensor, left_out: Tensor, outcomes: Tensor, seed: int = 0) -> Agreement:
    """Compare scores with real leave-one-out.

    Args:
        scores (`Tensor`): (queries, rows) in nats: without the row, a query's loss rises by its score.
        left_out (`Tensor`): (n,) positions of the rows that were left out.
        outcomes (`Tensor`): (n + 1, queries) losses, first with all rows, then without each: what `retrain` gives for
            [`without_rows`] and one seed.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    wanted = (len(left_out) + 1, scores.shape[0])
    if tuple(outcomes.shape) != wanted:
        raise ValueError(
            f"outcomes {tuple(outcomes.shape)} must be (all rows and {len(left_out)} left out, queries) = {wanted}"
        )
    if not bool(((left_out >= 0) & (left_out < scores.shape[1])).all()):
        raise ValueError(f"left_out names rows beyond the {scores.shape[1]} that have scores")
    measured = (outcomes[1:] - outcomes[0]).T
    return agreement(scores[:, left_out], measured, seed)
