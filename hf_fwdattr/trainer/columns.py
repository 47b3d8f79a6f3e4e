"""What a training set's columns say of its rows: the users' own ids, and the sources."""

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
