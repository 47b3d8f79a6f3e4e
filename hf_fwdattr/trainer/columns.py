"""Columns of a training set that say more about its rows: row ids, sources and text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError, UnsupportedError


__all__ = ["Sources", "column_of", "row_ids_of", "sources_of", "texts_of"]


@dataclass
class Sources:
    """Sources of a training set.

    Attributes:
        names (`list[str]`): names in sorted order.
        source_of_row (`Tensor`): (rows,) index of each row's source, -1 for none.
    """

    names: list[str]
    source_of_row: Tensor


def sources_of(dataset: Any, column: str | None, total: int) -> Sources:
    """Return the sources in the column; none without a column."""
    if column is None:
        return Sources([], torch.full((total,), -1))
    values = [None if value is None else str(value) for value in column_of(dataset, column, "source_column", total)]
    names = sorted({value for value in values if value is not None})
    index = {name: number for number, name in enumerate(names)}
    return Sources(names, torch.tensor([-1 if value is None else index[value] for value in values]))


def row_ids_of(dataset: Any, column: str | None, total: int) -> Tensor:
    """Return the ids (rows,) in the column; row indices without a column."""
    if column is None:
        return torch.arange(total)
    values = list(column_of(dataset, column, "row_id_column", total))
    if not all(isinstance(value, int) for value in values) or len(set(values)) < len(values):
        raise UnsupportedError(
            f"row_id_column={column!r}: its values cannot name rows. Row ids must be whole numbers, each used once"
        )
    return torch.tensor(values)


def column_of(dataset: Any, column: str, setting: str, total: int) -> list[Any]:
    """Return the column's values; `setting` names the option that asks for it.

    Raises:
        MismatchError: the dataset has another number of rows.
        UnsupportedError: the dataset has no such column.
    """
    if len(dataset) != total:
        raise MismatchError(
            f"{setting}={column!r} is read from a dataset of {len(dataset)} rows and {total} were trained on. Give "
            "ResponseCallback(dataset=...) the rows that the trainer ends up with"
        )
    names = getattr(dataset, "column_names", None)
    if names is None and len(dataset) and hasattr(dataset[0], "keys"):
        names = list(dataset[0].keys())
    if names is None or column not in names:
        raise UnsupportedError(f"{setting}={column!r}: the dataset has the columns {names}. Name one of them")
    if hasattr(dataset, "column_names"):
        return [_plain(value) for value in dataset[column]]
    return [_plain(dataset[index][column]) for index in range(total)]


def _plain(value: Any) -> Any:
    """Return a number of torch or NumPy as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def texts_of(dataset: Any, include_text: bool | str, tokenizer: Any) -> Iterator[str] | None:
    """Return the text of every row in order; None with `include_text=False`.

    Args:
        dataset: the rows, with `input_ids` or the column.
        include_text: as `ResponseConfig.include_text`.
        tokenizer: decodes the tokens, padding and special tokens left out.

    Raises:
        UnsupportedError: there is neither tokenizer nor column.
    """
    if include_text is False:
        return None
    if include_text is True and not hasattr(tokenizer, "decode"):
        raise UnsupportedError(
            "include_text=True decodes the rows and there is no tokenizer. Give the Trainer or build_bank a "
            "processing_class, or name the column with the text"
        )
    return _texts(dataset, include_text, tokenizer)


def _texts(dataset: Any, include_text: bool | str, tokenizer: Any) -> Iterator[str]:
    name = "input_ids" if include_text is True else str(include_text)
    for index in range(len(dataset)):
        row = dataset[index]
        if name not in row:
            raise UnsupportedError(
                f"include_text={include_text!r}: row {index} has no {name!r}. Name the column with the text"
            )
        if include_text is not True:
            yield str(row[name])
            continue
        tokens, mask = torch.as_tensor(row[name]), row.get("attention_mask")
        tokens = tokens if mask is None else tokens[torch.as_tensor(mask).bool()]
        yield tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
