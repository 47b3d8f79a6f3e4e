"""Linear datamodeling score: do summed scores of the kept rows rank retrained models as they really rank?

Park et al. 2023 (TRAK), section 4: for a query, the Spearman correlation over random subsets between the predicted and
the measured outcome of training on the subset; averaged over queries.
"""

from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from .agreement import Interval, finite, spearman


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


@dataclass(frozen=True)
class Recall:
    """Result of [`recall`].

    Attributes:
        at (`dict[int, Interval]`): recall@k: share of a query's teachers among its first k rows.
        hits (`dict[int, Interval]`): share of queries with a teacher among the first k.
        mrr (`Interval`): mean reciprocal rank of the first teacher.
    """

    at: dict[int, Interval]
    hits: dict[int, Interval]
    mrr: Interval


def recall(scores: Tensor, teachers: Tensor, ks: tuple[int, ...] = (1, 5, 50), seed: int = 0) -> Recall:
    """Rank rows by score and look where the teachers stand.

    Among equal scores teachers stand last, so that a method that says nothing finds nothing.

    Args:
        scores (`Tensor`): (queries, rows).
        teachers (`Tensor`): (queries, rows) booleans; every query has one at least.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a query without a teacher.
    """
    if scores.shape != teachers.shape or scores.ndim != 2 or teachers.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores.shape)} and teachers {tuple(teachers.shape)} {teachers.dtype} must both be "
            "(queries, rows), the second booleans"
        )
    finite(scores=scores)
    if not bool(teachers.any(1).all()):
        bad = (~teachers.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"queries {bad} have no teacher among the rows, so nothing could be found: leave them out")
    last = teachers.long().argsort(dim=1, stable=True)
    order = last.gather(1, scores.gather(1, last).argsort(dim=1, descending=True, stable=True))
    found = teachers.gather(1, order)
    first = found.long().argmax(1) + 1
    total = teachers.sum(1)
    return Recall(
        at={k: Interval.of(found[:, :k].sum(1) / total, seed) for k in ks},
        hits={k: Interval.of((first <= k).double(), seed) for k in ks},
        mrr=Interval.of(1.0 / first.double(), seed),
    )


@dataclass(frozen=True)
class Removal:
    """Result of [`removal`], in nats of loss.

    Attributes:
        top (`Interval`): rise of each query's loss without the rows ranked first for it.
        random (`Interval`): rise without as many random rows.
    """

    top: Interval
    random: Interval


def removal(outcomes: Tensor, random: Tensor, base: Tensor, seed: int = 0) -> Removal:
    """Compare removed rows with random ones.

    Args:
        outcomes (`Tensor`): (queries, queries) losses; line q is the retraining without query q's own first rows.
            Only its own loss is looked at: the diagonal.
        random (`Tensor`): (draws, queries) losses after leaving out as many random rows.
        base (`Tensor`): (queries,) losses with all rows.

    Raises:
        ValueError: shapes that do not fit together, or values that are not finite.
    """
    queries = len(base)
    if tuple(outcomes.shape) != (queries, queries) or random.ndim != 2 or random.shape[1] != queries:
        raise ValueError(
            f"for base (queries,) = ({queries},), outcomes must be (queries, queries) and random (draws, queries), "
            f"not {tuple(outcomes.shape)} and {tuple(random.shape)}"
        )
    finite(outcomes=outcomes, random=random, base=base)
    own = outcomes.double().diagonal()
    return Removal(Interval.of(own - base, seed), Interval.of(random.double().mean(0) - base, seed))


@dataclass(frozen=True)
class Brittleness:
    """Result of [`brittleness`].

    Attributes:
        counts (`Tensor`): (levels,) numbers of rows left out.
        lost (`Tensor`): (levels,) share of queries whose answer was lost with so many rows or with fewer.
        smallest (`Tensor`): (queries,) the fewest rows that lost it; infinite where none of the levels did.
    """

    counts: Tensor
    lost: Tensor
    smallest: Tensor


def brittleness(answered: Tensor, counts: Tensor) -> Brittleness:
    """Summarise retrainings without the first rows.

    Args:
        answered (`Tensor`): (levels, queries) booleans: the answer is still given after leaving out that many of the
            query's first rows (see `removal.without_top`).
        counts (`Tensor`): (levels,) numbers of rows left out, ascending.

    Raises:
        ValueError: shapes that do not fit, or counts that do not ascend.
    """
    if answered.dtype != torch.bool or answered.ndim != 2 or answered.shape[0] != len(counts):
        raise ValueError(
            f"answered must be booleans (levels, queries) with {len(counts)} levels, not {answered.dtype} "
            f"{tuple(answered.shape)}"
        )
    if bool((counts.diff() <= 0).any()):
        raise ValueError(f"counts={counts.tolist()} must ascend")
    needed = torch.where(answered, torch.inf, counts.double()[:, None])
    smallest = needed.min(0).values
    lost = (smallest[None] <= counts.double()[:, None]).double().mean(1)
    return Brittleness(counts, lost, smallest)


def mislabelled_auc(suspicion: Tensor, mislabelled: Tensor) -> float:
    """Chance that a mislabelled row is more suspect than a right one; equal suspicion counts half.

    Args:
        suspicion (`Tensor`): (rows,), larger is more suspect: a row's score for its own label (it alone explains it),
            or minus its mean score for held-out queries (it harms them).
        mislabelled (`Tensor`): (rows,) booleans.

    Raises:
        ValueError: other shapes, values that are not finite, or rows of one kind only.
    """
    if suspicion.ndim != 1 or suspicion.shape != mislabelled.shape or mislabelled.dtype != torch.bool:
        raise ValueError(
            f"suspicion {tuple(suspicion.shape)} and mislabelled {tuple(mislabelled.shape)} {mislabelled.dtype}: both "
            "must be (rows,), the second booleans"
        )
    finite(suspicion=suspicion)
    wrong = int(mislabelled.sum())
    right = len(mislabelled) - wrong
    if not wrong or not right:
        raise ValueError(f"{wrong} mislabelled and {right} right rows: the area needs both kinds")
    ranks = torch.from_numpy(rankdata(suspicion.double().numpy()))
    return (float(ranks[mislabelled].sum()) - wrong * (wrong + 1) / 2) / (wrong * right)
