"""Tokenized queries: checked, and padded into a batch."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QueryError
from ..models.likelihood import IGNORED
from ..models.positions import context_length


__all__ = [
    "Query", "check_batch_size", "check_queries", "check_tokens", "check_top_k", "pad_queries",
    "unpadded",
]  # fmt: skip

# `input_ids`, `labels` that are -100 where a token is not part of the output, and perhaps an `attention_mask`.
Query = Mapping[str, Sequence[int]]


def check_top_k(top_k: Any) -> int:
    """Return the number of rows to name on either side.

    Raises:
        ValueError: not a whole number, or a negative one.
    """
    why = None
    if isinstance(top_k, bool):
        why = f"a truth value does not say how many. Pass top_k={5 if top_k else 0}"
    elif isinstance(top_k, str):
        digits = top_k.strip()
        why = f"a text is not a number. Pass top_k={digits if digits.isdecimal() else 5}, without quotes"
    elif not hasattr(top_k, "__index__"):
        whole = isinstance(top_k, float) and top_k.is_integer() and top_k >= 0
        why = f"a {type(top_k).__name__} is not a whole number. Pass top_k={int(top_k) if whole else 5}"
    elif operator.index(top_k) < 0:
        why = "the number of rows to name on either side cannot be negative. Pass 0 or more"
    if why is not None:
        raise ValueError(f"top_k={top_k!r}: {why}")
    return operator.index(top_k)


def check_batch_size(batch_size: Any) -> int | None:
    """Return the number of queries that are read together; None for the default.

    Raises:
        ValueError: not a whole number, or less than one.
    """
    if batch_size is None:
        return None
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or operator.index(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size!r}: not a number of queries to read together. Pass 1 or more")
    return operator.index(batch_size)


def unpadded(query: Query, number: int = 0) -> tuple[list[int], list[int]]:
    """Return token ids and labels of a query without its padding, on whichever side that is.

    Args:
        number (`int`): the query's position among others, for messages.

    Raises:
        QueryError: tokens or labels are missing, are no whole numbers or do not fit, or a mask has holes.
    """
    ids, labels = _integers(query, "input_ids", number), _integers(query, "labels", number)
    if len(ids) != len(labels):
        raise QueryError(f"query {number} has {len(ids)} input_ids and {len(labels)} labels; one label per token")
    if query.get("attention_mask") is None:
        return ids, labels
    mask = _integers(query, "attention_mask", number)
    if len(mask) != len(ids):
        raise QueryError(f"query {number} has {len(ids)} input_ids and a mask of {len(mask)}; one value per token")
    kept = [index for index, value in enumerate(mask) if value]
    start, end = (kept[0], kept[-1] + 1) if kept else (0, 0)
    if len(kept) != end - start:
        raise QueryError(
            f"query {number} has a 0 in its attention_mask between tokens. Only padding at either end can be left "
            "out. Remove the tokens"
        )
    if any(label != IGNORED for label in labels[:start] + labels[end:]):
        raise QueryError(
            f"query {number} has a label at a token that its attention_mask leaves out. Padding is no output. Set the "
            "labels of padding to -100"
        )
    return ids[start:end], labels[start:end]


def _integers(query: Query, name: str, number: int) -> list[int]:
    """Return a column of a query as plain numbers."""
    if not isinstance(query, Mapping) or query.get(name) is None:
        raise QueryError(f"query {number} has no {name}. Pass a dictionary of input_ids and labels")
    column: Any = query[name]
    try:
        return [operator.index(value) for value in (column.tolist() if hasattr(column, "tolist") else column)]
    except TypeError as error:
        raise QueryError(f"query {number} has {name} that are not a list of whole numbers ({error})") from error


def pad_queries(queries: Sequence[Query], device: torch.device) -> dict[str, Tensor]:
    """Return queries as one batch, padded on the right, whatever padding they have."""
    pairs = [unpadded(query, number) for number, query in enumerate(queries)]
    width = max(len(ids) for ids, _ in pairs)

    def fill(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([tokens + [value] * (width - len(tokens)) for tokens in lists], device=device)

    return {
        "input_ids": fill([ids for ids, _ in pairs], 0),
        "attention_mask": fill([[1] * len(ids) for ids, _ in pairs], 0),
        "labels": fill([labels for _, labels in pairs], IGNORED),
    }


def check_queries(queries: Sequence[Query], model: nn.Module) -> None:
    """Refuse queries that cannot be scored, before anything is computed.

    Args:
        model (`nn.Module`): the model.

    Raises:
        QueryError: no supervised token, labels that do not fit, or too long for the model.
    """
    longest = context_length(model)
    if not queries:
        raise QueryError("there are no queries to score")
    if isinstance(queries, Mapping):
        raise QueryError("queries: one query, not a list of them. Pass [query]")
    for number, query in enumerate(queries):
        ids, labels = unpadded(query, number)
        if not any(label != IGNORED for label in labels[1:]):
            raise QueryError(f"query {number} has no supervised token (all labels are -100, or only its first token)")
        if longest is not None and len(ids) > longest:
            raise QueryError(f"query {number} has {len(ids)} tokens and the model reads at most {longest}; shorten it")
        check_tokens(ids, model, f"query {number} has the token")
        check_tokens([label for label in labels if label != IGNORED], model, f"query {number} has the label")


def check_tokens(ids: Sequence[int], model: Any, what: str) -> None:
    """Refuse token ids that are not in a model's vocabulary.

    Args:
        model: the model, or its config.
        what: the beginning of the message.

    Raises:
        QueryError: one of them is not.
    """
    config = getattr(model, "config", model)
    vocabulary = getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None)
    outside = [token for token in ids if token < 0 or (vocabulary is not None and token >= vocabulary)]
    if outside:
        raise QueryError(f"{what} {outside[0]}, which is not in the vocabulary")
