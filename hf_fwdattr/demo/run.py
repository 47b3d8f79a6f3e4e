"""The demo from end to end: base model, fine-tune with the callback, questions, tables, a page and a results file."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from .asking import Answer, ask, recall
from .base import build_base
from .facts import load_world
from .finetune import fine_tune, load_tokenizer, tokenized
from .job import Job, job_on_dataset, job_on_facts
from .page import Story, write_page
from .removal import check_by_removal
from .report import print_answer, print_recall, print_removal


LONGEST = 256  # tokens of a row, where the model's context allows more
SHOWN = 6  # answers that are printed in full
EXACT = 512  # rows up to which every row's own response is kept: facts have little in common to be compressed


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
    directions: int | float | str | None = None,
    top_k: int = 5,
    max_new_tokens: int = 16,
    check: bool = False,
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
        directions: As in `ResponseConfig`; None for exact responses where there are few rows, else the usual 128.
        top_k: Rows named on either side.
        check: Fine-tune again without the rows that are named, and count which answers are lost.
        quiet: No progress bars.
        console: Where the tables go; the terminal by default.

    Returns:
        The content of `results.json`: settings, seconds per phase, recall, and every answer.
    """
    output, console, clock = Path(output), console or Console(), Clock()
    output.mkdir(parents=True, exist_ok=True)
    with _calm(), _threads(1 if model is None else torch.get_num_threads()):
        world = load_world()
        base = model or str(output / "base")
        if model is None:
            with clock.phase("base model"):
                build_base(world.lessons, world.prose, Path(base), quiet=quiet)
        if dataset is None:
            job = job_on_facts(base, world, model, prompts)
        else:
            job = job_on_dataset(base, dataset, model, prompts, (text_column, source_column), split, rows)
        changes = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed}
        job = replace(job, settings=job.settings.changed(**changes))
        config = ResponseConfig(directions=_probes(directions, len(job.texts)), quiet=quiet, seed=seed)
        train, answers = _attribute(output / "adapter", clock, job, config, top_k, max_new_tokens)
        removal = []
        if check:
            with clock.phase("fine-tunes without the named rows"):
                removal = check_by_removal(job.base, train, job.settings, answers, quiet)
    story = Story(
        "Which rows made the model say this?", job.lead, _numbers(job, config, answers, clock), recall(answers, top_k),
        top_k, job.notes, removal,
    )  # fmt: skip
    results = _results(job, config, model, dataset, story, answers, clock)
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    write_page(output / "demo.html", story, answers)
    _print(console, output, story, answers, clock)
    return results


def _probes(wanted: int | float | str | None, rows: int) -> int | float | str:
    if wanted is not None:
        return wanted
    return "exact" if rows <= EXACT else 128


def _attribute(
    adapter: Path, clock: Clock, job: Job, config: ResponseConfig, top_k: int, max_new_tokens: int
) -> tuple[Dataset, list[Answer]]:
    """Fine-tune, make the bank, and ask: what a user of the package types."""
    context = getattr(AutoConfig.from_pretrained(job.base), "max_position_embeddings", None) or LONGEST
    train = tokenized(job.texts, job.sources, load_tokenizer(job.base), min(LONGEST, context))
    with clock.phase("fine-tune and bank"):
        callback = ResponseCallback(replace(config, source_column="source" if job.sources is not None else None))
        bar = None if config.quiet else "fine-tuning with LoRA"
        fine_tune(job.base, train, adapter, job.settings, [callback], bar)
    with clock.phase("questions"):
        attribute = pipeline(TASK, model=str(adapter))
        return train, ask(attribute, job.prompts, train, top_k, max_new_tokens, config.quiet)


def _shown(answers: Sequence[Answer]) -> list[Answer]:
    """A handful of answers, evenly spaced; of the fact world, one of every relation, in both wordings in turn."""
    if len(answers) <= SHOWN:
        return list(answers)
    # The two wordings of a question stand side by side.
    return [answers[i * len(answers) // SHOWN // 2 * 2 + i % 2] for i in range(SHOWN)]


def _numbers(job: Job, config: ResponseConfig, answers: Sequence[Answer], clock: Clock) -> list[tuple[str, str]]:
    """The line of numbers at the head of the page."""
    numbers = [(f"{len(job.texts):,}", "rows")]
    if job.sources is not None:
        numbers.append((str(len(set(job.sources))), "sources"))
    numbers += [(str(config.directions), "directions"), (str(len(answers)), "prompts")]
    return numbers + [(f"{value:.0f} s", name) for name, value in clock.seconds.items()]


def _results(
    job: Job,
    config: ResponseConfig,
    model: str | None,
    dataset: str | None,
    story: Story,
    answers: Sequence[Answer],
    clock: Clock,
) -> dict[str, Any]:
    """Everything that the demo found, as plain values."""
    return {
        "model": model or "a GPT-2 trained on the spot",
        "dataset": dataset or "the fact world",
        "rows": len(job.texts),
        "fine_tune": asdict(job.settings),
        "directions": config.directions,
        "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
        "recall": [asdict(line) for line in story.recall],
        "removal": [asdict(line) for line in story.removal],
        "answers": [answer.to_dict() for answer in answers],
    }


def _print(console: Console, output: Path, story: Story, answers: Sequence[Answer], clock: Clock) -> None:
    """The terminal's share: a handful of answers, the tables, and where the rest is."""
    for answer in _shown(answers):
        print_answer(console, answer)
    print_recall(console, story.recall, story.within)
    print_removal(console, story.removal)
    took = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    console.print(f"\n[dim]{took}[/]", soft_wrap=True)
    console.print(f"page: {output / 'demo.html'}\nresults: {output / 'results.json'}", soft_wrap=True, markup=False)


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
