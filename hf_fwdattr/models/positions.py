"""Longest row that a model reads: a limit of tables of positions, which rotary and relative positions do not have."""

import re
from typing import Any

from torch import Tensor, nn


__all__ = ["context_length"]

_TABLE = re.compile(r"(^|\.)(wpe|embed_positions?|position_embeddings?|positions_embed|pos_emb)$")


def context_length(model: nn.Module) -> int | None:
    """Return the number of tokens for which a model's table of positions has lines; None for a model without one.

    A table is learned (GPT-2, OPT, BERT) or fixed (GPT-J). Some begin with lines that no token reads: OPT's `offset`,
    and those up to the padding's in RoBERTa.
    """
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(length, int) or length <= 0:
        return None
    lines = [
        table.shape[0] - _unread(module)
        for path, module in model.named_modules()
        for name, table in _tables(path, module)
        if _TABLE.search(name) and table.ndim == 2 and table.shape[0] >= length
    ]
    return min(length, *lines) if lines else None


def _tables(path: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's weight by the module's path, and its buffers by theirs."""
    weight = getattr(module, "weight", None)
    found = [(path, weight)] if isinstance(weight, Tensor) else []
    return found + [(f"{path}.{name}", buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _unread(table: nn.Module) -> int:
    """Return the number of lines at the start of a table that no token reads."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    padding = getattr(table, "padding_idx", None)
    return padding + 1 if isinstance(padding, int) else 0
