"""The training set beside a bank: checked to be the one that was trained on, and read where rows are shown."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..bank.bank import ResponseBank
from ..bank.hashing import row_hashes
from ..bank.identity import naming_origins
from ..errors import QueryError


class TrainingSet:
    """What is shown of a bank's rows: those of a dataset, or the text that the bank keeps.

    Args:
        bank (`ResponseBank`): whose rows they are.
    """

    def __init__(self, bank: ResponseBank):
        self.bank = bank
        self._verified: tuple[Any, str | None] = (None, None)

    def verify(self, dataset: Any, some: int | None = None) -> None:
        """Refuse a dataset that is not the one the bank was made of; look at all rows, or at so many of them.

        Raises:
            MismatchError: the first row that differs, and where bank and dataset are from.
            QueryError: the dataset has no tokens to compare.
        """
        # A datasets.Dataset never changes: what makes another one of it gives it another fingerprint.
        known = getattr(dataset, "_fingerprint", None)
        seen, fingerprint = self._verified
        if seen is dataset and known is not None and known == fingerprint:
            return
        places = None
        with naming_origins(self.bank.manifest, dataset):
            if hasattr(dataset, "__len__"):
                self.bank.check_length(len(dataset))
                if some is not None and some < len(dataset):
                    places = sorted({round(at * (len(dataset) - 1) / max(some - 1, 1)) for at in range(some)})
            elif some is not None and some < len(self.bank):
                places = list(range(some))  # of a stream, whatever is further on costs as much as reading it all
            hashes = row_hashes(dataset if places is None else rows_at(dataset, places), self.bank.salt)
            if hashes is None:
                raise QueryError(
                    "the dataset has no 'input_ids', so its rows cannot be checked against the bank; pass the "
                    "tokenized training set, or verify_dataset=False to take rows by their position"
                )
            self.bank.check_rows(hashes, places)
        if places is None:
            self._verified = (dataset, known)

    def shown(self, dataset: Any, places: Sequence[int]) -> dict[int, Any]:
        """Rows by their positions: the dataset's, else `{"text": ...}` where the bank keeps it, else nothing."""
        if dataset is not None:
            return dict(zip(places, rows_at(dataset, places), strict=True))
        if not places or not self.bank.manifest.privacy.text:
            return {}
        return {place: {"text": text} for place, text in zip(places, self.bank.texts(places), strict=True)}


def rows_at(dataset: Any, places: Sequence[int]) -> list[Any]:
    """Rows of a dataset, or of a stream, which is read as far as it must be."""
    if hasattr(dataset, "__len__"):
        return [dataset[place] for place in places]
    wanted, read = set(places), islice(dataset, max(places, default=-1) + 1)
    found = {at: row for at, row in enumerate(read) if at in wanted}
    return [found[place] for place in places]
