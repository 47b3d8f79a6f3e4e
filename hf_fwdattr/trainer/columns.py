"""What a training set's columns say of its rows: the users' own ids, and the sources."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError, UnsupportedError


@dataclass
class Sources:
    """Which source each row belongs to: names, and (rows,) their indices, -1 for none."""

    names: list[str]
    of: Tensor


def sources_of(dataset: Any, column: str | None, total: int) -> Sources:
    """Names of sources in sorted order, and which one each row belongs to."""
    if column is None:
        return Sources([], torch.full((total,), -1))
    values = [None if value is None else str(value) for value in column_of(dataset, column, "source_column", total)]
    names = sorted({value for value in values if value is not None})
    place = {name: index for index, name in enumerate(names)}
    return Sources(names, torch.tensor([-1 if value is None else place[value] for value in values]))


def row_ids_of(dataset: Any, column: str | None, total: int) -> Tensor:
    """The ids (rows,) in the column, or positions."""
    if column is None:
        return torch.arange(total)
    values = list(column_of(dataset, column, "row_id_column", total))
    if not all(isinstance(value, int) for value in values) or len(set(values)) < len(values):
        raise UnsupportedError(f"row_id_column={column!r}: row ids must be whole numbers, each used once")
    return torch.tensor(values)


def column_of(dataset: Any, column: str, setting: str, total: int) -> list[Any]:
    """The column's values; `setting` is what named it.

    Raises:
        MismatchError: the dataset has another number of rows.
        UnsupportedError: it has no such column.
    """
    if len(dataset) != total:
        raise MismatchError(
            f"{setting}={column!r} is read from a dataset of {len(dataset)} rows and {total} were trained on; give "
            "ResponseCallback(dataset=...) the rows that the trainer ends up with"
        )
    names = getattr(dataset, "column_names", None)
    if names is None and len(dataset) and hasattr(dataset[0], "keys"):
        names = list(dataset[0].keys())
    if names is None or column not in names:
        raise UnsupportedError(f"{setting}={column!r}: the dataset has the columns {names}; name one of them")
    return list(dataset[column]) if hasattr(dataset, "column_names") else [row[column] for row in dataset]


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
