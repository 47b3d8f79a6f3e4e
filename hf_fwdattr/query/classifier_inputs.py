"""Inputs of sequence classifiers: a text or token ids, and the label that is asked about."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QueryError
from ..models.positions import context_length
from .inputs import Query


__all__ = ["class_names", "classifier_batch", "label_number", "labelled_queries", "tokenize_text"]


def class_names(config: Any) -> list[str]:
    """Return the name of each class, by its number."""
    return [str(config.id2label.get(number, number)) for number in range(config.num_labels)]


def label_number(config: Any, label: Any) -> int:
    """Return the number of a label, given by its number or its name in `config.id2label`.

    Raises:
        QueryError: the model has no such label.
    """
    names = class_names(config)
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    some = ", ".join(names[:5])
    raise QueryError(f"label={label!r}: the model has no such label. Its {len(names)} are {some}. Name one of them")


def tokenize_text(tokenizer: Any, model: Any, value: Any) -> Query:
    """Return token ids of an input, and its label, a list of one number: -1 where it is to be predicted.

    Args:
        model: the classifier.
        value: a text, or `{"text": ..., "label": ...}`, or a tokenized row with `input_ids` and perhaps `labels`.

    Raises:
        QueryError: another kind of input, an empty or overlong one, or a label that the model lacks.
    """
    row = value if isinstance(value, Mapping) else {"text": value}
    unknown = sorted(set(row) - {"text", "text_pair", "label", "labels", "input_ids", "attention_mask"})
    if unknown or ("text" in row) == ("input_ids" in row) or not isinstance(row.get("text", ""), str):
        raise QueryError(
            f"a {type(value).__name__}{f' with {unknown[0]!r}' if unknown else ''}: a classifier is asked about a "
            "text. Pass a text, or {'text': ..., 'label': ...}"
        )
    label = row.get("label", row.get("labels"))
    if "text" in row:
        ids = tokenizer(row["text"], row.get("text_pair"))["input_ids"]
    else:
        mask = row.get("attention_mask", [1] * len(row["input_ids"]))
        ids = [int(token) for token, kept in zip(row["input_ids"], mask, strict=True) if kept]
    limit = context_length(model)
    if not ids:
        raise QueryError("0 tokens: the text is empty, so there is nothing to classify. Pass a text")
    if limit is not None and len(ids) > limit:
        raise QueryError(f"{len(ids)} tokens: the model reads 1 to {limit}. Shorten the text")
    number = -1 if label is None else label_number(model.config, label)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [number]}


def classifier_batch(queries: Sequence[Query], model: Any, device: torch.device) -> dict[str, Tensor]:
    """Return tokenized queries as one batch, padded on the right with the model's own padding token.

    Args:
        model (`nn.Module`): the model.

    Raises:
        QueryError: a query without tokens or label or beyond the context, or several of different lengths without a
            padding token.
    """
    config, limit = getattr(model, "config", model), context_length(model)
    if not queries or not all(query.get("input_ids") and len(query.get("labels") or ()) == 1 for query in queries):
        raise QueryError("queries of a classifier have input_ids, and labels that are a list of one number. Add them")
    lists = [list(query["input_ids"]) for query in queries]
    width, padding = max(map(len, lists)), config.get_text_config().pad_token_id
    if limit is not None and width > limit:
        raise QueryError(f"a query has {width} tokens and the model reads at most {limit}. Shorten it")
    if padding is None and any(len(ids) < width for ids in lists):
        raise QueryError("config.pad_token_id=None: queries of different lengths need it. Ask one at a time")
    labels = [label_number(config, query["labels"][0]) for query in queries]
    return {
        "input_ids": torch.tensor([ids + [padding or 0] * (width - len(ids)) for ids in lists], device=device),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in lists], device=device),
        "labels": torch.tensor(labels, device=device),
    }


@torch.no_grad()
def labelled_queries(
    model: nn.Module, device: torch.device, inputs: Mapping[str, Tensor], options: Mapping[str, Any]
) -> list[Query]:
    """Return tokenized inputs as queries without padding, with predicted labels where none are given.

    Args:
        options: those of a call that went to `generate`.

    Raises:
        ValueError: there are options.
    """
    if options:
        name = next(iter(options))
        raise ValueError(f"{name}: no option of a classifier, which generates nothing. Leave it out")
    queries: list[Query] = []
    masks, labels = inputs["attention_mask"].bool(), inputs["labels"][:, 0].tolist()
    for padded, mask, given in zip(inputs["input_ids"], masks, labels, strict=True):
        ids, label = padded[mask][None].to(device), given
        if label < 0:
            label = int(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].argmax())
        queries.append({"input_ids": ids[0].tolist(), "labels": [label]})
    return queries
