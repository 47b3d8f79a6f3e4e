"""Fine-tunes with a weight on each row's loss: the same order of batches and the same steps, other losses.

Every step's loss becomes the sum of weight x row loss, divided by its divisor with all weights at one. With a row's
weight at zero this is leave-one-out along the trajectory; nothing else changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer

from ..errors import UnsupportedError
from ..models.likelihood import IGNORED, resolve_objective, row_losses
from .patching import Patches
from .row_weights import IndexedCollator, IndexedDataset
from .streams import ROW_KEY


__all__ = ["RetrainFunction", "WeightedLoss", "apply_row_weights", "query_losses"]


class WeightedLoss:
    """Stand-in for a trainer's `compute_loss` that weights each row's loss.

    Args:
        model (`nn.Module`): the trainer's.
        weights (`Tensor`): (rows,).
        objective: as `ResponseConfig.objective`.
    """

    def __init__(self, model: nn.Module, weights: Tensor, objective: Any = "auto"):
        self.weights, self.objective = weights, resolve_objective(model, objective)

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Any:
        row_indices = inputs.pop(ROW_KEY)
        logits, labels = self.objective.forward(model, inputs)
        losses = row_losses(logits, labels)
        weights = self.weights.to(losses)[row_indices.reshape(-1).to("cpu")]
        divisor = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum().clamp(min=1)
        loss = (losses * weights.to(losses.device)).sum() / divisor
        return (loss, {"logits": logits}) if return_outputs else loss


def apply_row_weights(trainer: Trainer, weights: Tensor, objective: Any = "auto") -> Trainer:
    """Patch a trainer so that each row's loss has a weight, and return it.

    Args:
        trainer (`Trainer`): not yet trained, without `ResponseCallback`.
        weights (`Tensor`): (rows,).
        objective: as `ResponseConfig.objective`.

    Raises:
        UnsupportedError: another number of rows, or a loss that is not the model's own likelihood.
    """
    dataset = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__") or len(dataset) != len(weights):
        count = len(dataset) if hasattr(dataset, "__len__") else "no countable number of"
        raise UnsupportedError(f"{len(weights)} weights for {count} rows. Every training row needs one")
    if getattr(trainer, "compute_loss_func", None) is not None or trainer.args.label_smoothing_factor:
        raise UnsupportedError(
            "a custom compute_loss_func, or label smoothing, has no losses of single rows to weight. Train with the "
            "model's own loss"
        )
    model = trainer.model
    assert model is not None
    collate, patches = trainer.data_collator, Patches()
    if trainer.args.remove_unused_columns:  # here, as the Trainer does: it must not remove the row indices too
        if hasattr(dataset, "column_names"):
            dataset = trainer._remove_unused_columns(dataset, description="training")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, "training")
        patches.replace(trainer.args, remove_unused_columns=False)
    patches.replace(
        trainer,
        train_dataset=IndexedDataset(dataset),
        data_collator=IndexedCollator(collate),
        compute_loss=WeightedLoss(model, weights.double().cpu(), objective),
    )
    return trainer


@torch.no_grad()
def query_losses(model: nn.Module, queries: list[dict[str, Any]], objective: Any = "auto") -> Tensor:
    """Return the summed losses (queries,) of tokenized queries in nats, in evaluation mode, float64.

    Args:
        queries: `input_ids` of each and `labels` (the ids themselves by default).
    """
    likelihood = resolve_objective(model, objective)
    device = next(model.parameters()).device
    mode = model.training
    model.eval()
    try:
        values = []
        for query in queries:
            tokens = torch.tensor([list(query["input_ids"])], device=device)
            labels = torch.tensor([query.get("labels", query["input_ids"])], device=device)
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
            logits, aligned = likelihood.forward(model, batch)
            values.append(row_losses(logits.double(), aligned)[0].cpu())
    finally:
        model.train(mode)
    return torch.stack(values)


class RetrainFunction:
    """Retrain function for [`evaluation.retrain`]: (subset or weights (rows,), seed) -> query losses (queries,).

    A Boolean subset leaves the other rows out of the training set, so that a half is trained with half as many
    steps; float weights keep order and number of steps and multiply the rows' losses.

    Args:
        make_trainer (`Callable`): seed -> a fresh, untrained Trainer with all rows, its own model in it.
        queries: as in [`query_losses`].
        objective: as `ResponseConfig.objective`.
    """

    def __init__(self, make_trainer: Callable[[int], Trainer], queries: list[dict[str, Any]], objective: Any = "auto"):
        self.make_trainer, self.queries, self.objective = make_trainer, queries, objective

    def __call__(self, rows: Tensor, seed: int) -> Tensor:
        trainer = self.make_trainer(seed)
        if rows.dtype == torch.bool:
            row_indices, data = rows.nonzero().flatten().tolist(), trainer.train_dataset
            subset = data.select(row_indices) if hasattr(data, "select") else Subset(data, row_indices)
            Patches().replace(trainer, train_dataset=subset)
        else:
            apply_row_weights(trainer, rows, self.objective)
        trainer.train()
        return query_losses(trainer.model, self.queries, self.objective)
