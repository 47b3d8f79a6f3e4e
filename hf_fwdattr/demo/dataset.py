"""Rows of a data set from the Hub or from a local path, with the names of their sources where there are any."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..errors import QueryError


READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_rows(
    name: str,
    split: str = "train",
    text_column: str = "text",
    source_column: str | None = None,
    limit: int | None = None,
) -> tuple[list[str], list[str] | None]:
    """Texts and source names of a data set, empty texts left out.

    Args:
        name: A file (.jsonl, .json, .csv, .parquet, .txt), a folder written by `save_to_disk`, or a Hub id.
        limit: Rows at most, from the first on.

    Raises:
        QueryError: a column is missing, or no row has text.
    """
    data = _load(name, split)
    wanted = [text_column, *([source_column] if source_column else [])]
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise QueryError(
            f"{name} has no column {missing[0]!r}; it has {', '.join(data.column_names)}. "
            "Say which with --text-column and --source-column"
        )
    kept = [(row[text_column], row.get(source_column)) for row in data if str(row[text_column] or "").strip()][:limit]
    if not kept:
        raise QueryError(f"no row of {name} has text in its column {text_column!r}")
    return [str(text) for text, _ in kept], [str(source) for _, source in kept] if source_column else None


def _load(name: str, split: str) -> Dataset:
    path = Path(name)
    data: Any
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        data = load_from_disk(name)
    elif path.suffix in READERS and path.exists():
        data = load_dataset(READERS[path.suffix], data_files=name, split="train")
    else:
        data = load_dataset(name, split=split)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise QueryError(f"{name} has no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    return data


def first_words(texts: Sequence[str], count: int = 4, words: int = 8) -> list[str]:
    """The beginnings of `count` texts, evenly spaced: prompts for whoever has none of their own."""
    step = max(1, len(texts) // count)
    return [" ".join(text.split()[:words]) for text in texts[::step][:count]]
