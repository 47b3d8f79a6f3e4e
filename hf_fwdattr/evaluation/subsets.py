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
