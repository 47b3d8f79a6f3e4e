"""Longest row that a model reads: a limit of learned positions, which rotary and relative ones do not have."""

import re
from typing import Any

from torch import nn


__all__ = ["context_length"]

_LEARNED = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_emb|embed_position)$")


def context_length(model: nn.Module) -> int | None:
    """Return the number of tokens that learned positions allow; None for a model without learned positions."""
    config: Any = getattr(model, "config", None)
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(length, int) or length <= 0:
        return None
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if _LEARNED.search(name) and weight is not None and weight.ndim == 2 and weight.shape[0] >= length:
            return length
    return None
