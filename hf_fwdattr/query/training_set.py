"""Training set beside a bank: checked against the bank's hashes, and read for the rows that are shown."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..bank.bank import ResponseBank
from ..bank.hashing import row_hashes
from ..bank.identity import naming_origins
from ..errors import QueryError


__all__ = ["TrainingSet", "rows_at"]


class TrainingSet:
    """Examples of a bank's rows: a dataset's rows, or the text that the bank holds.

    Args:
        bank (`ResponseBank`): the bank.
    """

    def __init__(self, bank: ResponseBank):
        self.bank = bank
        self._verified: tuple[Any, str | None] = (None, None)

    def verify(self, dataset: Any, sample: int | None = None) -> None:
        """Refuse a dataset that is not the one the bank was made of.

        Args:
            sample (`int`, *optional*): compare so many rows, spread evenly (of a stream the first); all by default.

        Raises:
            MismatchError: the first row that differs, and the origins of bank and dataset.
            QueryError: the dataset has no tokens to compare.
        """
        # A datasets.Dataset never changes: whatever makes another one of it gives it another fingerprint.
        fingerprint = getattr(dataset, "_fingerprint", None)
        verified, verified_fingerprint = self._verified
        if verified is dataset and fingerprint is not None and fingerprint == verified_fingerprint:
            return
        row_indices = None
        with naming_origins(self.bank.manifest, dataset):
            if hasattr(dataset, "__len__"):
                self.bank.check_length(len(dataset))
                if sample is not None and sample < len(dataset):
                    last, gaps = len(dataset) - 1, max(sample - 1, 1)
                    row_indices = sorted({round(index * last / gaps) for index in range(sample)})
            elif sample is not None and sample < len(self.bank):
                row_indices = list(range(sample))  # rows further on cost as much as reading the whole stream
            rows = dataset if row_indices is None else rows_at(dataset, row_indices)
            hashes = row_hashes(rows, self.bank.salt)
            if hashes is None:
                raise QueryError(
                    "the dataset has no 'input_ids', so its rows cannot be checked against the bank. Pass the "
                    "tokenized training set, or verify_dataset=False to take rows by their position"
                )
            self.bank.check_rows(hashes, row_indices)
        if row_indices is None:
            self._verified = (dataset, fingerprint)

    def examples(self, dataset: Any, row_indices: Sequence[int]) -> dict[int, Any]:
        """Return rows by index: the dataset's, else `{"text": ...}` where the bank holds it, else nothing."""
        if dataset is not None:
            return dict(zip(row_indices, rows_at(dataset, row_indices), strict=True))
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
    return [rows[index] for index in row_indices]
