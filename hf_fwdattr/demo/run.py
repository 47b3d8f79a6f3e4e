"""The demo from end to end: base model, fine-tune with the callback, questions, tables, a page and a results file."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from rich.console import Console
from transformers import AutoConfig, pipeline
from transformers.utils import logging as transformers_logging

from ..config import ResponseConfig
from ..pipeline import TASK
from ..trainer.callback import ResponseCallback
from .asking import Answer, Recall, ask, recall
from .base import build_base
from .dataset import first_words, load_rows
from .facts import Question, World, load_world
from .finetune import FineTuneSettings, fine_tune, load_tokenizer, tokenized
from .page import Story, write_page
from .report import print_answer, print_recall


LONGEST = 256  # tokens of a row, where the model's context allows more
SHOWN = 6  # answers that are printed in full
EXACT = 512  # rows up to which every row's own response is kept: facts have little in common to be compressed
NOTES = (
    "Only correct answers are counted: a wrong answer was not learned from the rows that teach the right one. "
    "Rows that state a fact the other way round (“N'Djamena is the capital of Chad”) do not count as teaching it: "
    "a causal language model does not learn the answer from them, though they share all its words.",
    "The score of a source is the sum over all its rows. The other entries of the same book may speak for other "
    "answers, so the book that taught the fact need not come first.",
)


@dataclass(frozen=True)
class Job:
    """What is fine-tuned on what, and what is asked."""

    base: str
    texts: Sequence[str]
    sources: Sequence[str] | None
    prompts: Sequence[str | Question]
    settings: FineTuneSettings
    lead: str


class Clock:
    """Seconds per phase of the demo, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def run_demo(
    output: str | Path = "demo",
    *,
    model: str | None = None,
    dataset: str | None = None,
    text_column: str = "text",
    source_column: str | None = None,
    split: str = "train",
    rows: int | None = None,
    prompts: Sequence[str] | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    probes: int | float | str | None = None,
    top_k: int = 5,
    max_new_tokens: int = 16,
    seed: int = 0,
    quiet: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune with LoRA and `ResponseCallback`, ask, and show which rows and sources are behind every answer.

    Without `model` a small GPT-2 is trained on the spot; without `dataset` it is fine-tuned on the fact world, whose
    teaching rows are known, so that the answer can be judged. Neither needs the Hub.

    Args:
        output: Folder for the base model, the adapter with its bank, `demo.html` and `results.json`.
        model: Hub id or folder of a causal language model.
        dataset: Hub id, folder or file with a column of text.
        text_column, source_column, split: Of `dataset`.
        rows: Rows of `dataset` to use at most.
        prompts: What to ask; without it, the world's questions, or the first words of a few rows.
        epochs, learning_rate: Of the fine-tune.
        probes: As in `ResponseConfig`; None for exact responses where there are few rows, else the usual 128.
        top_k: Rows named on either side.
        quiet: No progress bars.
        console: Where the tables go; the terminal by default.

    Returns:
        The content of `results.json`: settings, seconds per phase, recall, and every answer.
    """
    output, console, clock = Path(output), console or Console(), Clock()
    output.mkdir(parents=True, exist_ok=True)
    with _calm(), _threads(1 if model is None else torch.get_num_threads()):
        job = _job(output, clock, model, dataset, (text_column, source_column, split, rows), prompts, seed, quiet)
        settings = replace(
            job.settings,
            epochs=job.settings.epochs if epochs is None else epochs,
            learning_rate=job.settings.learning_rate if learning_rate is None else learning_rate,
        )
        if probes is None:
            probes = "exact" if len(job.texts) <= EXACT else 128
        train, answers = _attribute(
            output, clock, replace(job, settings=settings), probes, top_k, max_new_tokens, quiet
        )
    lines = recall(answers, top_k)
    for answer in _shown(answers):
        print_answer(console, answer)
    print_recall(console, lines, top_k)
    results = {
        "model": model or "a GPT-2 trained on the spot",
        "dataset": dataset or "the fact world",
        "rows": len(train),
        "fine_tune": asdict(settings),
        "probes": probes,
        "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
        "recall": [asdict(line) for line in lines],
        "answers": [answer.to_dict() for answer in answers],
    }
    _write(output, results, job, train, answers, lines, top_k)
    took = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    console.print(
        f"\n[dim]{took}[/]\npage: {output / 'demo.html'}\nresults: {output / 'results.json'}", soft_wrap=True
    )
    return results


def _job(
    output: Path,
    clock: Clock,
    model: str | None,
    dataset: str | None,
    columns: tuple[str, str | None, str, int | None],
    prompts: Sequence[str] | None,
    seed: int,
    quiet: bool,
) -> Job:
    """Fill in what was not given: a base model trained on the spot, the fact world and its questions."""
    world = load_world() if dataset is None else None
    if dataset is not None:
        text_column, source_column, split, limit = columns
        texts, sources = load_rows(dataset, split, text_column, source_column, limit)
    else:
        assert world is not None
        texts, sources = [row.text for row in world.rows], [row.source for row in world.rows]
    base = model
    if base is None:
        base = str(output / "base")
        with clock.phase("base model"):
            reading = world or load_world()
            build_base(reading.lessons, reading.prose, Path(base), quiet=quiet)
    asked: Sequence[str | Question] = prompts or (world.questions if world else first_words(texts))
    settings = FineTuneSettings(seed=seed)
    if model is not None:  # a model that knows its language is moved gently
        settings = FineTuneSettings(rank=8, epochs=3, batch_size=8, learning_rate=2e-4, seed=seed)
    return Job(base, texts, sources, asked, settings, _lead(model, dataset, world, len(texts)))


def _lead(model: str | None, dataset: str | None, world: World | None, rows: int) -> str:
    """The page's first paragraph."""
    who = f"{model} was" if model else "A small GPT-2, trained a minute ago on other countries and elements, was"
    what = f"{rows} rows of {dataset}" if dataset else f"{rows} rows that teach it facts"
    how = "Half of the questions are worded as the row that teaches the answer, half as no row is. " if world else ""
    return (
        f"{who} fine-tuned with LoRA on {what}, and then asked. {how}"
        "Choose a row to see which tokens of the answer it made likelier."
    )


def _attribute(
    output: Path, clock: Clock, job: Job, probes: int | float | str, top_k: int, max_new_tokens: int, quiet: bool
) -> tuple[Dataset, list[Answer]]:
    """Fine-tune, make the bank, and ask: what a user of the package types."""
    context = getattr(AutoConfig.from_pretrained(job.base), "max_position_embeddings", None) or LONGEST
    train = tokenized(job.texts, job.sources, load_tokenizer(job.base), min(LONGEST, context))
    config = ResponseConfig(
        probes=probes, source_column="source" if job.sources is not None else None, quiet=quiet, seed=job.settings.seed
    )
    adapter = output / "adapter"
    with clock.phase("fine-tune and bank"):
        callback = ResponseCallback(config)
        fine_tune(job.base, train, adapter, job.settings, [callback], None if quiet else "fine-tuning with LoRA")
    with clock.phase("questions"):
        attribute = pipeline(TASK, model=str(adapter))
        return train, ask(attribute, job.prompts, train, top_k, max_new_tokens, quiet)


def _shown(answers: Sequence[Answer]) -> list[Answer]:
    """A handful of answers, evenly spaced; of the fact world, one of every relation, in both wordings in turn."""
    if len(answers) <= SHOWN:
        return list(answers)
    step = len(answers) // SHOWN
    return [answers[i * step + i % 2] for i in range(SHOWN)]


def _write(
    output: Path,
    results: dict[str, Any],
    job: Job,
    train: Dataset,
    answers: Sequence[Answer],
    lines: Sequence[Recall],
    top_k: int,
) -> None:
    """The page and the results file."""
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    numbers = [(f"{len(train):,}", "rows"), (str(results["probes"]), "probes"), (str(len(answers)), "prompts")]
    if job.sources is not None:
        numbers.insert(1, (str(len(set(job.sources))), "sources"))
    numbers += [(f"{value:.0f} s", name) for name, value in results["seconds"].items()]
    story = Story("Which rows made the model say this?", job.lead, numbers, lines, top_k, NOTES if lines else ())
    write_page(output / "demo.html", story, answers)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads inside. The tiny model's matrices are too small to share: beside other programs, a second
    thread made its steps thirty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _calm() -> Iterator[None]:
    """Bars and notices of the libraries off, as far as they say nothing about the demo; put back afterwards."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    quiet_before = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not quiet_before:
            enable_progress_bars()
