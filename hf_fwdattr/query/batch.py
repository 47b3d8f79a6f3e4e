"""Scores of queries that are not text: batches that the user makes, of whatever the model takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.bank import ResponseBank
from ..errors import QueryError
from ..jvp.backend import Backend
from ..models.likelihood import IGNORED, Batch, Objective, resolve_objective
from .locking import one_at_a_time
from .ranking import scores


__all__ = ["batch_scores"]


@one_at_a_time
@torch.no_grad()
def batch_scores(
    model: nn.Module,
    bank: ResponseBank,
    batch: Batch,
    objective: str | Objective | Callable[..., Any] = "auto",
    readout: str = "auto",
) -> Tensor:
    """Score all rows for a batch of queries, such as images with the labels that are asked about.

    ```python
    batch = {"pixel_values": images, "labels": model(pixel_values=images).logits.argmax(-1)}
    batch_scores(model, ResponseBank.from_pretrained(folder), batch)  # why does the model say these?
    ```

    Args:
        model (`nn.Module`): the fine-tuned model, in evaluation mode.
        bank (`ResponseBank`): its bank.
        batch (`Mapping`): the arguments of the model's forward, queries first, and `labels`.
        objective: as in [`ResponseConfig`]; the bank was made with the same one.
        readout (`str`, defaults to `auto`): `jvp` or `difference`, as of [`Backend`].

    Returns:
        (queries, rows) in nats, float32, on the CPU.

    Raises:
        MismatchError: the bank belongs to another model.
        QueryError: no labels, labels that the model cannot give, or a bank that keeps sources only.
    """
    likelihood = resolve_objective(model, objective)
    if likelihood.name != bank.manifest.objective:
        raise QueryError(
            f"the bank was made for the objective {bank.manifest.objective!r} and is asked with {likelihood.name!r}. "
            "Pass the same objective"
        )
    if bank.manifest.privacy.rows == "sources":
        raise QueryError("the bank keeps sources only and has no rows to score")
    _check_labels(model, likelihood, batch.get("labels"))
    parameters = bank.check_model(model)
    directions = bank.directions()[: bank.manifest.directions].to(next(model.parameters()).device)
    with bank.query_weights(model, parameters):
        prepared = Backend(model, parameters, readout).prepare(batch, objective=likelihood)
        derivatives = prepared.jvp(directions)
    return scores(derivatives, bank.coordinates())


def _check_labels(model: nn.Module, likelihood: Objective, labels: Any) -> None:
    if not isinstance(labels, Tensor) or not bool((labels != IGNORED).any()):
        raise QueryError("the batch has no 'labels', which say what output is asked about. Add them")
    impossible = (labels < 0) & (labels != IGNORED)
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if likelihood.name == "sequence-classification" and classes is not None:
        impossible |= labels >= classes
    if bool(impossible.any()):
        raise QueryError(f"the batch has the label {int(labels[impossible][0])}, which the model cannot give")
