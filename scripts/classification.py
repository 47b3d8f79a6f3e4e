"""What the classification measurements share: a fine-tune, its bank's scores, the gradient dot product."""

import shutil
import tempfile
import time

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import SEQUENCE_CLASSIFICATION, row_losses
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import Parameters
from hf_fwdattr.query.batch import batch_scores


def arguments(folder: str, seed: int, **changes) -> TrainingArguments:
    """AdamW with the Trainer's own defaults but for `changes`."""
    defaults = dict(
        output_dir=folder, seed=seed, save_strategy="no", report_to=[], use_cpu=True, logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    return TrainingArguments(**(defaults | changes))


def fine_tune(model, rows, seed: int, collate=default_data_collator, callbacks=(), **changes):
    """The model after training on the rows, in evaluation mode; `seed` is that of the order of batches."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model, args=arguments(folder, seed, **changes), train_dataset=rows, data_collator=collate,
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train()
        for callback in callbacks:
            kept = callback.bank.save_pretrained(tempfile.mkdtemp())  # the folder is about to go
            callback.kept = kept
    return model.eval()


def batches(rows, collate=default_data_collator, size: int = 32):
    """Collated batches of rows, in order."""
    for at in range(0, len(rows), size):
        yield collate([rows[i] for i in range(at, min(at + size, len(rows)))])


@torch.no_grad()
def losses(model, rows, collate=default_data_collator) -> Tensor:
    """(rows,) negative log-likelihood of each row's label, nats."""
    parts = [row_losses(*SEQUENCE_CLASSIFICATION.forward(model, batch)) for batch in batches(rows, collate)]
    return torch.cat(parts).double()


@torch.no_grad()
def accuracy(model, rows, collate=default_data_collator) -> float:
    """Share of rows whose label is the likeliest."""
    hits = []
    for batch in batches(rows, collate):
        logits, labels = SEQUENCE_CLASSIFICATION.forward(model, batch)
        hits.append(logits.argmax(-1).eq(labels).flatten())
    return float(torch.cat(hits).double().mean())


def bank_scores(
    model, rows, queries, seed: int, settings: dict, collate=default_data_collator, size: int = 32, own: bool = False,
    **changes,
):  # fmt: skip
    """Scores of a bank that is made while training.

    Returns:
        (queries, rows); with `own` the score of each row for itself, (rows,); what it cost; the trained model.
    """
    callback = ResponseCallback(ResponseConfig(quiet=True, **settings))
    began = time.time()
    model = fine_tune(model, rows, seed, collate, [callback], **changes)
    built = time.time() - began
    try:
        bank = ResponseBank.from_pretrained(callback.kept.parent)
        began = time.time()
        scores = torch.cat([batch_scores(model, bank, batch) for batch in batches(queries, collate, size)])
        asked = time.time() - began
        mine = [batch_scores(model, bank, batch) for batch in batches(rows, collate, size)] if own else []
        facts = {"directions": bank.manifest.directions, "kept": bank.manifest.explained_variance}
    finally:
        shutil.rmtree(callback.kept.parent)
    return (
        scores,
        torch.cat(mine).diagonal() if own else None,
        facts | {"train and build s": built, "s / query": asked / len(queries)},
        model,
    )


def gradient_dot(model, rows, queries, parameters: str, collate=default_data_collator) -> Tensor:
    """(queries, rows) at the end of training."""
    chosen = Parameters.of(model, parameters)  # at rest, nothing would be trainable
    with frozen(model):
        gradients = PerSampleGradients(model, chosen, SEQUENCE_CLASSIFICATION)

        def of(part) -> Tensor:
            return torch.cat([gradients(batch)[0] for batch in batches(part, collate)])

        return of(queries) @ of(rows).T
