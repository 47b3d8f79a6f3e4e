"""Tokenized queries: checked, and padded into a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QueryError
from ..models.likelihood import IGNORED


__all__ = ["Query", "check_queries", "pad_queries"]

Query = Mapping[str, Sequence[int]]  # `input_ids`, and `labels` that are -100 where a token is not part of the output


def pad_queries(queries: Sequence[Query], device: torch.device) -> dict[str, Tensor]:
    """Return queries as one batch, padded on the right."""
    width = max(len(query["input_ids"]) for query in queries)

    def fill(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([tokens + [value] * (width - len(tokens)) for tokens in lists], device=device)

    return {
        "input_ids": fill([list(query["input_ids"]) for query in queries], 0),
        "attention_mask": fill([[1] * len(query["input_ids"]) for query in queries], 0),
        "labels": fill([list(query["labels"]) for query in queries], IGNORED),
    }


def check_queries(queries: Sequence[Query], config: Any) -> None:
    """Refuse queries that cannot be scored, before anything is computed.

    Args:
        config: the model's config.

    Raises:
        QueryError: no supervised token, labels that do not fit, or too long for the model.
    """
    longest, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if not queries:
        raise QueryError("there are no queries to score")
    for number, query in enumerate(queries):
        ids, labels = query["input_ids"], query["labels"]
        if len(ids) != len(labels):
            raise QueryError(f"query {number} has {len(ids)} input_ids and {len(labels)} labels; one label per token")
        if not any(label != IGNORED for label in labels[1:]):
            raise QueryError(f"query {number} has no supervised token (all labels are -100, or only its first token)")
        if longest is not None and len(ids) > longest:
            raise QueryError(f"query {number} has {len(ids)} tokens and the model reads at most {longest}; shorten it")
        for kind, values in (("token", ids), ("label", [label for label in labels if label != IGNORED])):
            outside = [value for value in values if value < 0 or (vocabulary is not None and value >= vocabulary)]
            if outside:
                raise QueryError(f"query {number} has the {kind} {outside[0]}, which is not in the vocabulary")
