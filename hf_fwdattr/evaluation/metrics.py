"""Metrics of attribution scores, for the scores of any method: plain tensors in, plain numbers out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import Interval, require_finite, scipy_stats, spearman


__all__ = [
    "Brittleness",
    "Recall",
    "Removal",
    "brittleness",
    "lds",
    "mislabelled_auc",
    "noise_ceiling",
    "recall",
    "removal",
]


def lds(scores: Tensor, subsets: Tensor, outcomes: Tensor, seed: int = 0) -> Interval:
    """Compute the linear datamodeling score: do summed scores of the kept rows rank the retrained models correctly?

    Park et al. 2023 (TRAK), section 4: per query, the Spearman correlation over random subsets between the predicted
    and the measured outcome of training on the subset; averaged over queries.

    Args:
        scores (`Tensor`): (queries, rows); a larger score says that the row makes the query likelier.
        subsets (`Tensor`): (subsets, rows), booleans or weights of the rows in each retraining.
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
    require_finite(scores=scores, outcomes=outcomes)
    predicted = subsets.double() @ scores.double().T
    return Interval.of(spearman(predicted, -outcomes.double()), seed)


def noise_ceiling(outcomes: Tensor, seed: int = 0) -> Interval:
    """Compute the rank correlation of one retraining with the mean of the others, every seed in turn.

    Args:
        outcomes (`Tensor`): (seeds, subsets, queries), at least two seeds.

    Raises:
        ValueError: fewer than two seeds.
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
    """Recall of relevant rows, result of [`recall`].

    Attributes:
        at (`dict[int, Interval]`): recall@k: share of a query's relevant rows among its first k rows.
        hits (`dict[int, Interval]`): share of queries with a relevant row among the first k.
        mrr (`Interval`): mean reciprocal rank of the first relevant row.
    """

    at: dict[int, Interval]
    hits: dict[int, Interval]
    mrr: Interval


def recall(scores: Tensor, relevant: Tensor, ks: tuple[int, ...] = (1, 5, 50), seed: int = 0) -> Recall:
    """Rank rows by score and find the ranks of the relevant ones.

    Among equal scores relevant rows rank last, so that constant scores find nothing.

    Args:
        scores (`Tensor`): (queries, rows).
        relevant (`Tensor`): (queries, rows) booleans; at least one per query.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a query without a relevant row.
    """
    if scores.shape != relevant.shape or scores.ndim != 2 or relevant.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)} {relevant.dtype} must both be "
            "(queries, rows), the second booleans"
        )
    require_finite(scores=scores)
    if not bool(relevant.any(1).all()):
        bad = (~relevant.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"queries {bad} have no relevant row, so none could be found: leave them out")
    relevant_last = relevant.long().argsort(dim=1, stable=True)
    order = relevant_last.gather(1, scores.gather(1, relevant_last).argsort(dim=1, descending=True, stable=True))
    ranked = relevant.gather(1, order)
    first = ranked.long().argmax(1) + 1
    total = relevant.sum(1)
    return Recall(
        at={k: Interval.of(ranked[:, :k].sum(1) / total, seed) for k in ks},
        hits={k: Interval.of((first <= k).double(), seed) for k in ks},
        mrr=Interval.of(1.0 / first.double(), seed),
    )


@dataclass(frozen=True)
class Removal:
    """Rise of losses without rows, in nats, result of [`removal`].

    Attributes:
        top (`Interval`): without the rows ranked first for each query.
        random (`Interval`): without as many random rows.
    """

    top: Interval
    random: Interval


def removal(outcomes: Tensor, random: Tensor, base: Tensor, seed: int = 0) -> Removal:
    """Compare retraining without the first rows of each query with retraining without random rows.

    Args:
        outcomes (`Tensor`): (queries, queries) losses; line q is the retraining without the first rows of query q.
            Only the loss of that query is used: the diagonal.
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
    require_finite(outcomes=outcomes, random=random, base=base)
    top = outcomes.double().diagonal()
    return Removal(Interval.of(top - base, seed), Interval.of(random.double().mean(0) - base, seed))


@dataclass(frozen=True)
class Brittleness:
    """Number of rows whose removal changes an answer, result of [`brittleness`].

    Attributes:
        counts (`Tensor`): (levels,) numbers of rows left out.
        lost (`Tensor`): (levels,) share of queries whose answer was lost at this level or a lower one.
        smallest (`Tensor`): (queries,) the lowest count that lost the answer; infinite where no level did.
    """

    counts: Tensor
    lost: Tensor
    smallest: Tensor


def brittleness(answered: Tensor, counts: Tensor) -> Brittleness:
    """Summarise retrainings without more and more of the first rows of each query.

    Args:
        answered (`Tensor`): (levels, queries) booleans: the answer is still given after leaving out that many of the
            query's first rows (see [`without_top`]).
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
    """Compute the area under the ROC curve: the chance that a mislabelled row is more suspect than a correct one.

    Equal suspicion counts half.

    Args:
        suspicion (`Tensor`): (rows,), larger is more suspect: a row's score for its own label (no other row explains
            it), or minus its mean score for held-out queries (it harms them).
        mislabelled (`Tensor`): (rows,) booleans.

    Raises:
        ValueError: other shapes, values that are not finite, or rows of one kind only.
    """
    if suspicion.ndim != 1 or suspicion.shape != mislabelled.shape or mislabelled.dtype != torch.bool:
        raise ValueError(
            f"suspicion {tuple(suspicion.shape)} and mislabelled {tuple(mislabelled.shape)} {mislabelled.dtype}: both "
            "must be (rows,), the second booleans"
        )
    require_finite(suspicion=suspicion)
    wrong = int(mislabelled.sum())
    correct = len(mislabelled) - wrong
    if not wrong or not correct:
        raise ValueError(f"{wrong} mislabelled and {correct} correct rows: the area needs both kinds")
    ranks = torch.from_numpy(scipy_stats().rankdata(suspicion.double().numpy()))
    return (float(ranks[mislabelled].sum()) - wrong * (wrong + 1) / 2) / (wrong * correct)
