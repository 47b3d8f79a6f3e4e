"""Linear datamodeling score: do summed scores of the kept rows rank retrained models as they really rank?

Park et al. 2023 (TRAK), section 4: for a query, the Spearman correlation over random subsets between the predicted and
the measured outcome of training on the subset; averaged over queries.
"""

import torch
from torch import Tensor

from .agreement import spearman
from .interval import Interval, finite


def lds(scores: Tensor, subsets: Tensor, outcomes: Tensor, seed: int = 0) -> Interval:
    """Linear datamodeling score of a matrix of scores.

    Args:
        scores (`Tensor`): (queries, rows); a larger score says that the row makes the query likelier.
        subsets (`Tensor`): (subsets, rows), booleans or weights: what each retraining kept.
        outcomes (`Tensor`): (subsets, queries) losses after retraining, in nats. They are negated here, so that a
            method of the right sign scores above zero.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    wanted = (subsets.shape[0], scores.shape[0])
    if tuple(outcomes.shape) != wanted or subsets.shape[1] != scores.shape[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} (queries, rows), subsets {tuple(subsets.shape)} (subsets, rows) and "
            f"outcomes {tuple(outcomes.shape)} do not fit; outcomes must be (subsets, queries) = {wanted}"
        )
    finite(scores=scores, outcomes=outcomes)
    predicted = subsets.double() @ scores.double().T
    return Interval.of(spearman(predicted, -outcomes.double()), seed)


def noise_ceiling(outcomes: Tensor, seed: int = 0) -> Interval:
    """How well retrainings predict each other: one against the mean of the others.

    Args:
        outcomes (`Tensor`): (seeds, subsets, queries), at least two seeds. Every seed is left out once.
    """
    if len(outcomes) < 2:
        raise ValueError(
            f"outcomes of {len(outcomes)} seed(s): the noise ceiling compares retrainings, so it needs two"
        )
    others = [outcomes[torch.arange(len(outcomes)) != i].mean(0) for i in range(len(outcomes))]
    singles = [spearman(one.double(), rest.double()) for one, rest in zip(outcomes, others, strict=True)]
    return Interval.of(torch.stack(singles).mean(0), seed)
