"""What the commands do between their options and the library: open models and datasets by name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, pipeline
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import QueryError
from ..pipeline import TASK, AutoModelForAttribution
from ..trainer.build import build_bank


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


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a model or adapter folder, which may have it itself or leave it to the base model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_for(
    model: str,
    dataset: str,
    config: Path | None,
    record: Path | None,
    output: Path | None,
    text_column: str,
    split: str,
    quiet: bool,
) -> Path:
    """`hf-fwdattr build`; returns the bank's folder."""
    settings = ResponseConfig.from_dict(json.loads(config.read_text()) if config else {})
    settings.quiet = settings.quiet or quiet
    if output is None and not Path(model).is_dir():
        raise QueryError(f"{model} is no local folder to put the bank into; say --output")
    loaded = AutoModelForAttribution.from_pretrained(model)
    tokenizer = open_tokenizer(model)
    length = getattr(loaded.config, "max_position_embeddings", None)
    rows = tokenized(open_dataset(dataset, split), tokenizer, text_column, length)
    own = "labels" in rows.column_names  # the other collator would make labels of all tokens, masked ones too
    collate = DataCollatorForSeq2Seq(tokenizer) if own else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    folder = (output or Path(model)) / settings.folder
    build_bank(loaded, rows, settings, data_collator=collate, processing_class=tokenizer, record=record, folder=folder)
    return folder


@contextmanager
def silence(wanted: bool) -> Iterator[None]:
    """No progress bars of transformers and datasets either."""
    loud = wanted and is_progress_bar_enabled(), wanted and not are_progress_bars_disabled()
    if wanted:
        disable_progress_bar()
        disable_progress_bars()
    try:
        yield
    finally:
        if loud[0]:
            enable_progress_bar()
        if loud[1]:
            enable_progress_bars()


def attribute_with(
    model: str,
    prompt: str,
    completion: str | None,
    dataset: str | None,
    bank: str | None,
    split: str,
    top_k: int,
    max_new_tokens: int,
    readout: str,
    text_column: str,
    budget: str | None = None,
    precision: str = "auto",
) -> dict[str, Any]:
    """`hf-fwdattr attribute`; returns the pipeline's result."""
    extra: dict[str, Any] = {"readout": readout, "precision": precision}
    if bank is not None:
        extra["bank"] = ResponseBank.from_pretrained(bank)
    run = pipeline(TASK, model=model, tokenizer=open_tokenizer(model), **extra)
    length = getattr(run.model.config, "max_position_embeddings", None)
    rows = None if dataset is None else tokenized(open_dataset(dataset, split), run.tokenizer, text_column, length)
    query: Any = prompt if completion is None else {"prompt": prompt, "completion": completion}
    more = {} if budget is None else {"budget": int(budget) if budget.lstrip("-").isdigit() else budget}
    result: dict[str, Any] = run(query, dataset=rows, top_k=top_k, max_new_tokens=max_new_tokens, **more)
    return result
