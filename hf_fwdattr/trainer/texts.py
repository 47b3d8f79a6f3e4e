"""The rows' text for a bank that shall keep it."""

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UnsupportedError


def texts_of(dataset: Any, chosen: bool | str, tokenizer: Any) -> Iterator[str] | None:
    """Text of every row, in order; None where none is wanted.

    Args:
        dataset: the rows, with `input_ids` or the column.
        chosen: as `ResponseConfig.include_text`.
        tokenizer: decodes the tokens, padding and special tokens left out.

    Raises:
        UnsupportedError: there is neither tokenizer nor column.
    """
    if chosen is False:
        return None
    if chosen is True and not hasattr(tokenizer, "decode"):
        raise UnsupportedError(
            "include_text=True decodes the rows and there is no tokenizer: give the Trainer or build_bank a "
            "processing_class, or name the column with the text"
        )
    return _texts(dataset, chosen, tokenizer)


def _texts(dataset: Any, chosen: bool | str, tokenizer: Any) -> Iterator[str]:
    for at in range(len(dataset)):
        row, name = dataset[at], "input_ids" if chosen is True else str(chosen)
        if name not in row:
            raise UnsupportedError(f"include_text={chosen!r}: row {at} has no {name!r}; name the column with the text")
        if chosen is not True:
            yield str(row[name])
            continue
        tokens, mask = torch.as_tensor(row[name]), row.get("attention_mask")
        tokens = tokens if mask is None else tokens[torch.as_tensor(mask).bool()]
        yield tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
