"""Random subsets of the training rows, for retraining."""

import torch
from torch import Tensor


def random_halves(rows: int, count: int, seed: int = 0) -> Tensor:
    """(count, rows) of booleans, each line keeping half of the rows (rounded down).

    Line i depends on `seed` and i alone, so that more halves can be asked for later without changing the first ones.
    """
    kept = torch.zeros(count, rows, dtype=torch.bool)
    for index in range(count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        kept[index, torch.randperm(rows, generator=generator)[: rows // 2]] = True
    return kept
