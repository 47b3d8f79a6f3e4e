"""Token lists that are asked about: checked, and padded together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QueryError
from ..models.likelihood import IGNORED


Query = Mapping[str, Sequence[int]]


def padded(queries: Sequence[Query], device: torch.device) -> dict[str, Tensor]:
    """Token lists as a batch, right-padded together."""
    width = max(len(query["input_ids"]) for query in queries)

    def fill(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([line + [value] * (width - len(line)) for line in lists], device=device)

    return {
        "input_ids": fill([list(query["input_ids"]) for query in queries], 0),
        "attention_mask": fill([[1] * len(query["input_ids"]) for query in queries], 0),
        "labels": fill([list(query["labels"]) for query in queries], IGNORED),
    }


def check(queries: Sequence[Query], settings: Any) -> None:
    """Refuse queries that cannot be scored, before anything is computed.

    Args:
        settings: the model's config.

    Raises:
        QueryError: no supervised token, labels that do not fit, or too long for the model.
    """
    longest, known = getattr(settings, "max_position_embeddings", None), getattr(settings, "vocab_size", None)
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
        for what, values in (("token", ids), ("label", [label for label in labels if label != IGNORED])):
            strange = [v for v in values if v < 0 or (known is not None and v >= known)]
            if strange:
                raise QueryError(f"query {number} has the {what} {strange[0]}, which is not in the vocabulary")
