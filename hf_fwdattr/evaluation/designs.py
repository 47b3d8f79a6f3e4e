"""Designs of retraining experiments: which rows each retraining keeps, or with which weight."""

import torch
from torch import Tensor


__all__ = ["random_halves", "random_rows", "without_random", "without_rows", "without_sources", "without_top"]

# A Trainer's sampler shuffles by torch's permutation for the training's own seed. Rows drawn with the same seed would
# be those of the first batches, whose removal is the least typical of all (see `random_rows`).
_SEED_OFFSET = 2_654_435_769  # within 32 bits: of a longer seed torch uses the lowest 32 only


def random_halves(rows: int, count: int, seed: int = 0) -> Tensor:
    """Draw (count, rows) booleans, each line keeping half of the rows (rounded down).

    Line i depends on `seed` and i alone, so that more halves can be drawn later without changing the first ones.
    """
    kept = torch.zeros(count, rows, dtype=torch.bool)
    for index in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        kept[index, torch.randperm(rows, generator=generator)[: rows // 2]] = True
    return kept


def random_rows(rows: int, count: int, seed: int = 0) -> Tensor:
    """Draw the indices (count,) of different rows to leave out one at a time, at most all of them.

    More rows can be drawn later without changing the first ones. Whatever the seed of the training, these are not the
    rows of its first batches: there Adam moves a weight by the learning rate however small its gradient is, and a
    single row turns signs, which no derivative predicts.
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(_SEED_OFFSET + seed))[:count]


def without_rows(rows: int, left_out: Tensor) -> Tensor:
    """Return float weights (n + 1, rows) for `retrain`: first all ones, then one line per left-out row (n,)."""
    weights = torch.ones(len(left_out) + 1, rows)
    weights[torch.arange(1, len(left_out) + 1), left_out] = 0.0
    return weights


def without_sources(row_sources: Tensor, left_out: Tensor) -> Tensor:
    """Return float weights (n + 1, rows) for `retrain`: first all ones, then without the rows of each source.

    Args:
        row_sources (`Tensor`): (rows,) source of each row.
        left_out (`Tensor`): (n,) sources.
    """
    lines = [torch.ones(len(row_sources)), *(row_sources.ne(source).float() for source in left_out)]
    return torch.stack(lines)


def without_top(scores: Tensor, count: int) -> Tensor:
    """Return booleans (queries, rows) for `retrain`: for each query all rows but the `count` of the highest scores.

    Raises:
        ValueError: not between 1 and all rows but one.
    """
    if not 1 <= count < scores.shape[1]:
        raise ValueError(f"count={count}: leave out at least one of {scores.shape[1]} rows, and not all")
    kept = torch.ones(scores.shape, dtype=torch.bool)
    kept.scatter_(1, scores.topk(count, dim=1).indices, False)
    return kept


def without_random(rows: int, count: int, draws: int, seed: int = 0) -> Tensor:
    """Return booleans (draws, rows) for `retrain`, each line without `count` random rows."""
    generator = torch.Generator().manual_seed(seed)
    return without_top(torch.rand(draws, rows, generator=generator), count)
