"""What `evaluation.retrain` needs, from a function that makes Trainers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import Trainer

from .weighted import query_losses, weigh


class Retraining:
    """`train` for [`evaluation.retrain`]: (subset or weights (rows,), seed) -> losses of the queries (queries,).

    A subset of booleans leaves the other rows out of the training set, so that a half is trained with half as many
    steps; float weights keep order and number of steps and multiply the rows' losses.

    Args:
        make_trainer (`Callable`): seed -> a fresh, untrained Trainer with all rows, its own model in it.
        queries: token lists, `input_ids` and `labels`.
        objective: as `ResponseConfig.objective`.
    """

    def __init__(self, make_trainer: Callable[[int], Trainer], queries: list[dict[str, Any]], objective: Any = "auto"):
        self.make_trainer, self.queries, self.objective = make_trainer, queries, objective

    def __call__(self, rows: Tensor, seed: int) -> Tensor:
        trainer = self.make_trainer(seed)
        if rows.dtype == torch.bool:
            kept = rows.nonzero().flatten().tolist()
            data: Any = trainer.train_dataset
            trainer.train_dataset = data.select(kept) if hasattr(data, "select") else Subset(data, kept)
        else:
            weigh(trainer, rows, self.objective)
        trainer.train()
        return query_losses(trainer.model, self.queries, self.objective)
