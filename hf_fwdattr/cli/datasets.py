"""What the commands do between their options and the library: open models and datasets by name."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk

from ..errors import QueryError


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def open_dataset(name: str, split: str = "train") -> Dataset:
    """A dataset by Hub id, local file (JSON, CSV, parquet, text) or folder written by `save_to_disk`."""
    path = Path(name)
    if path.is_file():
        if path.suffix not in _READERS:
            raise QueryError(f"cannot read {path}; known are {', '.join(sorted(_READERS))} and saved datasets")
        return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        loaded = load_from_disk(name)
        return loaded if isinstance(loaded, Dataset) else loaded[split]
    return load_dataset(name, split=split)


def tokenized(dataset: Dataset, tokenizer: Any, text_column: str, length: int | None) -> Dataset:
    """The dataset with `input_ids`; its own are kept if it has them."""
    if "input_ids" in dataset.column_names:
        return dataset
    if text_column not in dataset.column_names:
        raise QueryError(
            f"the dataset has the columns {dataset.column_names}: neither 'input_ids' nor {text_column!r}"
        )
    return dataset.map(
        lambda rows: {"input_ids": tokenizer(rows[text_column], truncation=True, max_length=length)["input_ids"]},
        batched=True,
    )
