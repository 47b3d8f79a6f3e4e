"""Columns of a training set that say more about its rows: row ids, sources and text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MismatchError, UnsupportedError


__all__ = ["Sources", "column_of", "plain_value", "row_ids_of", "rows_in_trained_order", "sources_of", "texts_of"]

_COMPARED = 2048  # rows of two datasets that are compared


@dataclass
class Sources:
    """Sources of a training set.

    Attributes:
        names (`list[str]`): names in sorted order.
        source_of_row (`Tensor`): (rows,) index of each row's source, -1 for none.
    """

    names: list[str]
    source_of_row: Tensor


def rows_in_trained_order(given: Any, trained: Any, wanted: list[str], seed: int | None = None) -> Any:
    """Return the dataset that a user gave for its columns, with its rows in the order of the rows that are trained on.

    Args:
        given: the dataset with row ids, sources or text.
        trained: the dataset that the trainer ended up with.
        wanted (`list[str]`): columns that are read from `given`. They decide only where no other column is shared, as
            they may have been given anew.
        seed (`int`, *optional*): with which TRL's `shuffle_dataset=True` shuffled the rows.

    Raises:
        MismatchError: the rows are others, or in another order.
    """
    if given is trained or not all(
        hasattr(rows, "__getitem__") and hasattr(rows, "__len__") for rows in (given, trained)
    ):
        return given  # a stream, whose rows have ids of their own
    if len(given) != len(trained):
        raise MismatchError(
            f"ResponseCallback(dataset=...): it has {len(given)} rows and {len(trained)} are trained on. A row's id "
            "and source are read at its index. Leave dataset= out if the training set has the columns, or give the "
            "rows that the trainer ends up with"
        )
    names = set(_column_names(given) or ()) & set(_column_names(trained) or ()) if len(trained) else set()
    names = {name for name in names if _is_small(trained[0][name])}
    compared = sorted(names - {*wanted, "labels"}) or sorted(names & set(wanted))
    indices = list(range(0, len(trained), max(1, -(-len(trained) // _COMPARED))))
    expected = list(_values(trained, indices, compared))
    is_constant = all(_match(row[name], expected[0][name]) for row in expected for name in compared)
    if is_constant and seed is None:  # nothing tells the rows apart
        return given
    candidates = [given] if seed is None or not hasattr(given, "shuffle") else [given, given.shuffle(seed=seed)]
    cause = "no column that both have tells the rows apart"
    for candidate in [] if is_constant else candidates:
        found = zip(indices, _values(candidate, indices, compared), expected, strict=True)
        differing = (index for index, one, other in found if not all(_match(one[name], other[name]) for name in other))
        row = next(differing, None)
        if row is None:
            return candidate
        cause = f"row {row} is another there"
    shuffled = "" if seed is None else " (SFTConfig(shuffle_dataset=True) shuffles them)"
    raise MismatchError(
        f"ResponseCallback(dataset=...): its rows are not in the order of those that are trained on{shuffled}: "
        f"{cause}. Each row would get the id and source of another. Leave dataset= out and keep the columns in the "
        "training set, or give its rows in the trained order"
    )


def _values(dataset: Any, indices: list[int], names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield these columns of rows; others, such as images, are not even decoded."""
    rows = dataset.select_columns(names) if hasattr(dataset, "select_columns") else dataset
    for index in indices:
        row = rows[index] if names else {}
        yield {name: row[name] for name in names}


def _is_small(value: Any) -> bool:
    """Return whether two thousand values like this one are compared in no time, as those of images are not."""
    if isinstance(value, Tensor | np.ndarray):
        return math.prod(value.shape) <= 1 << 16
    return value is None or isinstance(value, str | int | float | list | dict)


def _match(one: Any, other: Any) -> bool:
    """Return whether two values are the same, but for a trainer that cut a sequence or added its end."""
    one, other = (value.tolist() if hasattr(value, "tolist") else value for value in (one, other))
    if isinstance(one, str | list) and type(one) is type(other):
        short, long = sorted((one, other), key=len)
        return bool(long[: len(short)] == short or long[len(long) - len(short) :] == short)
    return bool(one == other)


def _column_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "column_names", None)
    if names is None and len(dataset) and hasattr(dataset[0], "keys"):
        names = list(dataset[0].keys())
    return names


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
    names = _column_names(dataset)
    if names is None or column not in names:
        raise UnsupportedError(f"{setting}={column!r}: the dataset has the columns {names}. Name one of them")
    if hasattr(dataset, "column_names"):
        return [plain_value(value) for value in dataset[column]]
    return [plain_value(dataset[index][column]) for index in range(total)]


def plain_value(value: Any) -> Any:
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
