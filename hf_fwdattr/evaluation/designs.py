"""Random subsets of the training rows, for retraining."""

import torch
from torch import Tensor


# A Trainer's sampler shuffles by torch's permutation for the training's own seed. Rows drawn with the same seed would
# be those of the first batches, whose removal is the least typical of all (see `random_rows`).
_APART = 2_654_435_769  # within 32 bits: of a longer seed torch uses the lowest 32 only


def random_halves(rows: int, count: int, seed: int = 0) -> Tensor:
    """(count, rows) of booleans, each line keeping half of the rows (rounded down).

    Line i depends on `seed` and i alone, so that more halves can be asked for later without changing the first ones.
    """
    kept = torch.zeros(count, rows, dtype=torch.bool)
    for index in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        kept[index, torch.randperm(rows, generator=generator)[: rows // 2]] = True
    return kept


def random_rows(rows: int, count: int, seed: int = 0) -> Tensor:
    """(count,) positions of different rows to leave out one at a time, at most all of them.

    More rows can be asked for later without changing the first ones. Whatever the seed of the training, these are not
    the rows of its first batches: there Adam moves a weight by the learning rate however small its gradient is, and a
    single row turns signs, which no derivative tells.
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(_APART + seed))[:count]


def without_rows(rows: int, left_out: Tensor) -> Tensor:
    """(left out + 1, rows) float weights for `retrain`: first all ones, then one line per row with a zero in it."""
    weights = torch.ones(len(left_out) + 1, rows)
    weights[torch.arange(1, len(left_out) + 1), left_out] = 0.0
    return weights


def without_sources(owner: Tensor, left_out: Tensor) -> Tensor:
    """(left out + 1, rows) float weights for `retrain`: first all ones, then without each source's rows.

    Args:
        owner (`Tensor`): (rows,) source of each row.
        left_out (`Tensor`): (n,) sources.
    """
    lines = [torch.ones(len(owner)), *(owner.ne(source).float() for source in left_out)]
    return torch.stack(lines)


def without_top(scores: Tensor, count: int) -> Tensor:
    """(queries, rows) booleans for `retrain`: for each query all rows but the `count` of the highest scores.

    Raises:
        ValueError: not between 1 and all rows but one.
    """
    if not 1 <= count < scores.shape[1]:
        raise ValueError(f"count={count}: leave out at least one of {scores.shape[1]} rows, and not all")
    kept = torch.ones(scores.shape, dtype=torch.bool)
    kept.scatter_(1, scores.topk(count, dim=1).indices, False)
    return kept


def without_random(rows: int, count: int, draws: int, seed: int = 0) -> Tensor:
    """(draws, rows) booleans for `retrain`, each line without `count` random rows."""
    generator = torch.Generator().manual_seed(seed)
    return without_top(torch.rand(draws, rows, generator=generator), count)
