"""Datasets named on the command line: Hub id, local file, or folder written by `save_to_disk`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..errors import QueryError
from ..query.raw_rows import is_raw


__all__ = ["DatasetSource"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class DatasetSource:
    """A dataset by name.

    Attributes:
        name (`str`): Hub id, file (JSON, CSV, parquet, text), or folder written by `save_to_disk`.
        split (`str`): its split; a file has one only.
        text_column (`str`): the column with the text of a row.
    """

    name: str
    split: str = "train"
    text_column: str = "text"

    def load(self) -> Dataset:
        """Load the rows.

        Raises:
            QueryError: a file of an unknown kind, or a split that the dataset does not have.
        """
        if not self.name.strip():
            raise QueryError("--dataset: an empty name. Name a Hub id, a local file, or a saved dataset")
        path = Path(self.name)
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise QueryError(f"cannot read {path}; known are {', '.join(sorted(_BUILDERS))} and saved datasets")
            return self._load_file(path)
        if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return load_dataset(self.name, split=self.split)
        dataset = load_from_disk(self.name)
        if not isinstance(dataset, DatasetDict):
            if self.split != "train" and self.split != str(dataset.split):
                raise QueryError(f"--split: {self.split}. {self.name} was saved without splits. Leave the option out")
            return dataset
        if self.split not in dataset:
            raise QueryError(f"{self.name} has no split {self.split!r}; it has {', '.join(dataset)}")
        return dataset[self.split]

    def _load_file(self, path: Path) -> Dataset:
        if not self.split.startswith("train"):
            raise QueryError(f"--split: {self.split}. {path} is a file and has no splits. Leave the option out")
        if not path.stat().st_size:
            raise QueryError(f"cannot read {path}: the file is empty. Pass the training set")
        if path.suffix != ".parquet":
            _check_utf8(path)  # readers may notice a wrong byte only when the row is shown
        try:
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split=self.split)
        except (DatasetsError, ValueError, StopIteration) as error:
            cause = error.__cause__ or error
            why = " ".join(str(cause).split()) or "no rows"
            raise QueryError(
                f"cannot read {path} ({type(cause).__name__}: {why}). It must be {path.suffix[1:]} in UTF-8"
            ) from error

    def rows(self) -> Dataset:
        """Load the rows as they are: tokenized, or with the texts or messages that the pipeline tokenizes.

        Raises:
            QueryError: the dataset has neither `input_ids` nor texts nor messages.
        """
        dataset = self.load()
        if "input_ids" not in dataset.column_names and not (len(dataset) and is_raw(dataset[0])):
            raise QueryError(
                f"--dataset: {self.name} has the columns {', '.join(dataset.column_names)}: neither 'input_ids' nor "
                "texts nor messages. Pass the training set"
            )
        return dataset

    def tokenized(self, tokenizer: Any, max_length: int | None) -> Dataset:
        """Load the rows with their `input_ids`, tokenized here where the dataset has only text.

        Raises:
            QueryError: the dataset has neither `input_ids` nor the column of text.
        """
        dataset, column = self.load(), self.text_column
        if "input_ids" in dataset.column_names:
            return dataset
        if column not in dataset.column_names:
            raise QueryError(f"the dataset has the columns {dataset.column_names}: neither 'input_ids' nor {column!r}")
        return dataset.map(
            lambda rows: {"input_ids": tokenizer(rows[column], truncation=True, max_length=max_length)["input_ids"]},
            batched=True,
        )

    def texts(self, source_column: str | None = None, limit: int | None = None) -> tuple[list[str], list[str] | None]:
        """Load the first `limit` texts that are not empty and, given their column, the sources.

        Raises:
            QueryError: a column is missing, or no row has text.
        """
        dataset = self.load()
        for column in (self.text_column, source_column):
            if column is not None and column not in dataset.column_names:
                raise QueryError(
                    f"{self.name} has no column {column!r}; it has {', '.join(dataset.column_names)}. "
                    "Say which with --text-column and --source-column"
                )
        rows = [row for row in dataset if str(row[self.text_column] or "").strip()][:limit]
        if not rows:
            raise QueryError(f"no row of {self.name} has text in its column {self.text_column!r}")
        texts = [str(row[self.text_column]) for row in rows]
        return texts, [str(row[source_column]) for row in rows] if source_column else None


def _check_utf8(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise QueryError(
                    f"cannot read {path}: line {number} has the byte 0x{line[error.start]:02x}, not UTF-8. "
                    "Save the file in UTF-8"
                ) from error
