"""Training sets without random access: rows are known by their own ids, and those that were read are kept on disk."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import MismatchError, UnsupportedError
from .columns import plain_value


__all__ = ["NO_ROW_ID", "ROW_KEY", "IndexedRow", "IndexedStream", "StreamRows", "first_rows", "read_again", "row_id"]

ROW_KEY = "fwdattr_rows"  # the row index in a feature, and the tensor of row indices in a batch
NO_ROW_ID = -(1 << 63)  # index of a row of a stream whose column holds no whole number of 64 bits


class IndexedRow(NamedTuple):
    """A row that has no room for its index, and the index, on their way to the collator."""

    row: Any
    row_index: int


class IndexedStream(IterableDataset):
    """A stream that gives each row with its id.

    Nothing is raised for a row without one, as training may have begun: its id is [`NO_ROW_ID`].
    """

    def __init__(self, dataset: Any, column: str):
        self.dataset, self.column = dataset, column

    def __iter__(self) -> Iterator[IndexedRow]:
        for row in self.dataset:
            number = _id_in(row, self.column)
            yield IndexedRow(row, NO_ROW_ID if number is None else number)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while being unpickled in a worker, before __init__'s attribute is there
            raise AttributeError(name)
        return getattr(self.dataset, name)


def row_id(row: Any, column: str) -> int:
    """Return the id of a row of a stream.

    Raises:
        UnsupportedError: the row has no whole number in the column.
    """
    value = _id_in(row, column)
    if value is None:
        found = repr(row.get(column) if hasattr(row, "get") else row)[:80]
        raise UnsupportedError(
            f"row_id_column={column!r}: a row of the stream has {found} there and must have a whole number. "
            "`Dataset.map(lambda row, i: {...: i}, with_indices=True)` right after loading gives one"
        )
    return value


def _id_in(row: Any, column: str) -> int | None:
    """Return the whole number of 64 bits in a row's column; None if there is none."""
    value = plain_value(row.get(column)) if hasattr(row, "get") else None
    return value if isinstance(value, int) and NO_ROW_ID < value < 1 << 63 else None


def first_rows(stream: Any, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a stream, for a check before training."""
    return [dict(row) for row in islice(iter(stream), count)]


def read_again(stream: Any, column: str | None, visits: list[Tensor]) -> tuple["StreamRows", list[Tensor]]:
    """Return the rows of a stream that were trained on, and their ids in `visits` as row indices.

    Raises:
        MismatchError: the stream does not give a row a second time.
    """
    row_ids = torch.cat(visits).unique()
    rows = StreamRows(stream, str(column), row_ids.tolist())
    return rows, [torch.searchsorted(row_ids, some) for some in visits]


class StreamRows:
    """Rows of a stream by their ids: read once more, written to a temporary folder, and mapped from there.

    Args:
        stream: gives the same rows each time it is read.
        column (`str`): column with the row ids.
        row_ids (`list[int]`): ids of the rows to keep.

    Attributes:
        dataset (`Dataset`): those rows, in the order of their ids; removed from disk with this object.

    Raises:
        MismatchError: the stream does not give a row a second time.
    """

    def __init__(self, stream: Any, column: str, row_ids: list[int]):
        folder = tempfile.mkdtemp(prefix="fwdattr-rows-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "rows.arrow"
        missing, written = set(row_ids), []
        with ArrowWriter(path=str(path)) as writer:
            for row in stream:
                number = row_id(row, column)
                if number in missing:
                    missing.discard(number)
                    written.append(number)
                    writer.write(dict(row))
                if not missing:
                    break
            if missing:
                raise MismatchError(
                    f"row {min(missing)} was trained on, and the stream does not give it a second time. Its rows and "
                    f"their {column!r} must be the same each time it is read. Use a stream that repeats itself"
                )
            writer.finalize()
        by_id = sorted(range(len(written)), key=written.__getitem__)
        self.dataset = Dataset.from_file(str(path)).select(by_id)
