"""What the commands do between their options and the library: open models and datasets by name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, pipeline
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import QueryError
from ..pipeline import TASK, AutoModelForAttribution
from ..trainer.build import build_bank
from .datasets import open_dataset, tokenized


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
