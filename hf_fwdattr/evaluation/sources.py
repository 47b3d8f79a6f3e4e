"""Leave one source out: train again with the same seed and order, the weights of all rows of a source zero."""

import torch
from torch import Tensor

from .agreement import Agreement
from .loo import loo


def without_sources(owner: Tensor, left_out: Tensor) -> Tensor:
    """(left out + 1, rows) float weights for `retrain`: first all ones, then without each source's rows.

    Args:
        owner (`Tensor`): (rows,) source of each row.
        left_out (`Tensor`): (n,) sources.
    """
    lines = [torch.ones(len(owner)), *(owner.ne(source).float() for source in left_out)]
    return torch.stack(lines)


def summed(scores: Tensor, owner: Tensor, sources: int) -> Tensor:
    """(queries, sources): scores of rows (queries, rows) summed over each source; rows of source -1 go nowhere."""
    if owner.shape != scores.shape[1:]:
        raise ValueError(
            f"owner {tuple(owner.shape)} must name the source of each of the {scores.shape[1]} rows that have scores"
        )
    member = torch.zeros(scores.shape[1], sources, dtype=torch.float64)
    inside = owner >= 0
    member[inside.nonzero().flatten(), owner[inside]] = 1.0
    return scores.double() @ member


def leave_sources_out(source_scores: Tensor, left_out: Tensor, outcomes: Tensor, seed: int = 0) -> Agreement:
    """Compare scores of sources with real removal.

    Args:
        source_scores (`Tensor`): (queries, sources) in nats, a bank's own or rows' [`summed`].
        left_out (`Tensor`): (n,) sources that were left out.
        outcomes (`Tensor`): (n + 1, queries) losses, first with all rows, then without each source.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    return loo(source_scores, left_out, outcomes, seed)
