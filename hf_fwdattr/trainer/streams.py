"""Training sets without random access: rows go by their own ids, and those that were seen are kept on disk."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import IterableDataset

from ..errors import MismatchError, UnsupportedError


KEY = "fwdattr_rows"


class MarkedStream(IterableDataset):
    """A stream whose rows say their id once more, under a name that no collator knows."""

    def __init__(self, dataset: Any, column: str):
        self.dataset, self.column = dataset, column

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.dataset:
            yield {**row, KEY: row_id(row, self.column)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while being unpickled in a worker, before __init__'s attribute is there
            raise AttributeError(name)
        return getattr(self.dataset, name)


def row_id(row: Any, column: str) -> int:
    """The id of a row of a stream.

    Raises:
        UnsupportedError: it has none.
    """
    value = row.get(column) if hasattr(row, "get") else None
    if not isinstance(value, int):
        raise UnsupportedError(
            f"row_id_column={column!r}: a row of the stream has {value!r} there, and must have a whole number "
            "(`Dataset.map(lambda row, i: {...: i}, with_indices=True)` right after loading gives one)"
        )
    return value


def first_rows(stream: Any, count: int) -> list[dict[str, Any]]:
    """The first rows of a stream, to be looked at."""
    return [dict(row) for row in islice(iter(stream), count)]


class KeptRows:
    """Rows of a stream by their ids: read once more, written to a temporary folder, and mapped from there.

    Attributes:
        dataset (`Dataset`): the rows that were wanted, in the order of their ids.
        ids (`list[int]`): those.

    Raises:
        MismatchError: the stream did not give a wanted row again.
    """

    def __init__(self, stream: Any, column: str, wanted: list[int]):
        folder = tempfile.mkdtemp(prefix="fwdattr-rows-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "rows.arrow"
        left, order = set(wanted), []
        with ArrowWriter(path=str(path)) as writer:
            for row in stream:
                number = row_id(row, column)
                if number in left:
                    left.discard(number)
                    order.append(number)
                    writer.write(dict(row))
                if not left:
                    break
            if left:
                raise MismatchError(
                    f"row {min(left)} was trained on, but the stream does not give it a second time; its rows and "
                    f"their {column!r} must be the same each time it is read"
                )
            writer.finalize()
        self.ids = sorted(order)
        places = sorted(range(len(order)), key=order.__getitem__)
        self.dataset = Dataset.from_file(str(path)).select(places)
