"""Training set beside a bank: checked against the bank's hashes, and read for the rows that are shown."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from ..bank.bank import ResponseBank
from ..bank.hashing import row_hashes
from ..bank.identity import naming_origins
from ..errors import MismatchError, QueryError
from .raw_rows import RawRows, is_raw


__all__ = ["TrainingSet", "check_kind", "rows_at"]
logger = logging.getLogger(__name__)


class TrainingSet:
    """Examples of a bank's rows: a dataset's rows, or the text that the bank holds.

    Args:
        bank (`ResponseBank`): the bank.
        tokenizer (*optional*): tokenizes rows that are given as text or messages, to compare them.
    """

    def __init__(self, bank: ResponseBank, tokenizer: Any = None):
        self.bank, self.tokenizer = bank, tokenizer
        self._verified: tuple[Any, str | None, list[int] | None] = (None, None, None)

    def check(self, dataset: Any, by_position: bool = True) -> None:
        """Refuse what is no dataset of rows in order, or has another number of rows than the bank.

        Args:
            by_position (`bool`): the dataset's rows are not compared, and so are the bank's one by one. Otherwise one
                that is not tokenized may have more rows, as training leaves some out.

        Raises:
            MismatchError: another number of rows.
            QueryError: a dictionary of splits, a table, a generator, or anything else that is not read row by row.
        """
        check_kind(dataset)
        if not hasattr(dataset, "__len__") or self.bank.manifest.privacy.rows != "identified":
            return
        if by_position or len(dataset) < len(self.bank) or not self._is_raw(dataset):
            self.bank.check_length(len(dataset))

    def verify(self, dataset: Any, sample: int | None = None) -> list[int] | None:
        """Refuse a dataset that is not the one the bank was made of.

        Args:
            dataset: rows with `input_ids`, or as their owner has them: `messages`, `prompt` and `completion`, `text`.
            sample (`int`, *optional*): compare so many rows, spread evenly (of a stream the first); all by default.

        Returns:
            Which of the dataset's rows is each of the bank's, where the training shuffled rows or left some out; None
            where they are one by one the same.

        Raises:
            MismatchError: the first row that differs, and the origins of bank and dataset.
            QueryError: the dataset has no tokens to compare.
        """
        check_kind(dataset)
        if sample is not None and (type(sample) is not int or sample < 1):
            raise QueryError(
                f"verify_dataset={sample!r}: not a number of rows to compare. Give True, False or 1 or more"
            )
        # A datasets.Dataset never changes: whatever makes another one of it gives it another fingerprint.
        fingerprint = getattr(dataset, "_fingerprint", None)
        verified, verified_fingerprint, order = self._verified
        if verified is dataset and fingerprint is not None and fingerprint == verified_fingerprint:
            return order
        with naming_origins(self.bank.manifest, dataset):
            order, whole = None, True
            if sample is None and hasattr(dataset, "__len__") and self._is_raw(dataset):
                order = self._order(dataset)
            else:
                whole = self._compare(dataset, sample)
        if whole:
            self._verified = (dataset, fingerprint, order)
        return order

    def _compare(self, dataset: Any, sample: int | None) -> bool:
        """Compare rows with the bank's one by one; return whether all were."""
        row_indices = None
        if hasattr(dataset, "__len__"):
            self.bank.check_length(len(dataset))
            if sample is not None and sample < len(dataset):
                last, gaps = len(dataset) - 1, max(sample - 1, 1)
                row_indices = sorted({round(index * last / gaps) for index in range(sample)})
        elif sample is not None and sample < len(self.bank):
            row_indices = list(range(sample))  # rows further on cost as much as reading the whole stream
        rows = dataset if row_indices is None else rows_at(dataset, row_indices)
        hashes = self._hashes(rows)
        self.bank.check_rows(hashes, row_indices)
        return row_indices is None

    def _order(self, dataset: Any) -> list[int] | None:
        """Return which row of a dataset that is not tokenized is each of the bank's; None if one by one the same."""
        if len(dataset) < len(self.bank):
            self.bank.check_length(len(dataset))
        order = RawRows(self.bank.manifest, self.bank.salt, self.tokenizer).order(dataset, self._stored())
        if order is not None:
            logger.warning(
                "dataset: the training shuffled its rows, or left some out. Each row of the bank is shown by the "
                "dataset's row of the same tokens; `row` counts the rows as they were trained on"
            )
        return order

    def _is_raw(self, rows: Any) -> bool:
        if "input_ids" in (getattr(rows, "column_names", None) or ()) or self.tokenizer is None:
            return False
        return self.bank.manifest.privacy.rows == "identified" and is_raw(_first_row(rows))

    def _stored(self) -> list[bytes]:
        return [bytes(line.tolist()) for block in self.bank.row_hashes() for line in block]

    def _hashes(self, rows: Any) -> Iterator[bytes]:
        """Return the hashes of rows, tokenized or not."""
        if self._is_raw(rows):
            raw = RawRows(self.bank.manifest, self.bank.salt, self.tokenizer)
            return raw.hashes(rows, set(self._stored()))
        hashes = row_hashes(rows, self.bank.salt)
        if hashes is None:
            raise QueryError(
                "the dataset has no 'input_ids', so its rows cannot be checked against the bank. Pass the "
                "tokenized training set, or verify_dataset=False to take rows by their position"
            )
        return hashes

    def examples(self, dataset: Any, row_indices: Sequence[int], order: Sequence[int] | None = None) -> dict[int, Any]:
        """Return rows by index: the dataset's, else `{"text": ...}` where the bank holds it, else nothing.

        Args:
            order (*optional*): which of the dataset's rows is each of the bank's, as `verify` returned it.
        """
        if dataset is not None:
            indices = row_indices if order is None else [order[index] for index in row_indices]
            return dict(zip(row_indices, rows_at(dataset, indices), strict=True))
        if not row_indices or not self.bank.manifest.privacy.text:
            return {}
        texts = self.bank.texts(row_indices)
        return {index: {"text": text} for index, text in zip(row_indices, texts, strict=True)}


def rows_at(dataset: Any, row_indices: Sequence[int]) -> list[Any]:
    """Return rows of a dataset, or of a stream, which is read no further than it must be."""
    if hasattr(dataset, "__len__"):
        return [dataset[index] for index in row_indices]
    wanted, prefix = set(row_indices), islice(dataset, max(row_indices, default=-1) + 1)
    rows = {index: row for index, row in enumerate(prefix) if index in wanted}
    if missing := wanted - rows.keys():
        raise MismatchError(f"row {min(missing)}: the dataset ends before it. Pass the training set, in its order")
    return [rows[index] for index in row_indices]


def _first_row(rows: Any) -> Any:
    """Return the first row of a dataset or stream; None if there is none."""
    if hasattr(rows, "__len__"):
        return rows[0] if len(rows) else None
    return next(iter(rows), None)


def check_kind(dataset: Any) -> None:
    """Refuse what is no dataset of rows in order.

    Raises:
        QueryError: naming what it is, and how to get its rows.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping) and any(hasattr(value, "column_names") for value in dataset.values()):
        splits = ", ".join(map(repr, dataset))
        raise QueryError(
            f"dataset: a {kind} of the splits {splits}. Rows are of one. Pass dataset[{next(iter(dataset))!r}]"
        )
    if isinstance(dataset, Mapping):
        raise QueryError(f"dataset: a {kind}, not a list of rows. Pass datasets.Dataset.from_dict(...)")
    if hasattr(dataset, "iloc"):
        raise QueryError(
            f"dataset: a {kind} of pandas, whose rows are read by columns. Pass "
            "datasets.Dataset.from_pandas(frame, preserve_index=False)"
        )
    if isinstance(dataset, str | bytes):
        raise QueryError(
            f"dataset: {str(dataset)[:80]!r}, a text. Pass its rows, as datasets.load_dataset returns them"
        )
    if hasattr(dataset, "__next__"):
        raise QueryError(
            f"dataset: a {kind}, which can be read only once, to be checked or to be shown. Pass a list of its rows, "
            "or datasets.IterableDataset.from_generator(function)"
        )
    if not hasattr(dataset, "__iter__" if not hasattr(dataset, "__len__") else "__getitem__"):
        raise QueryError(
            f"dataset: a {kind}, which gives no rows by their position. Pass a list or a datasets.Dataset"
        )
