"""The demo from end to end: base model, fine-tune with the callback, questions, tables, a page and a results file."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoConfig, pipeline

from ..config import ResponseConfig
from ..pipeline import TASK
from ..trainer.callback import ResponseCallback
from .ask import Answer, ask, recall
from .base_model import build_base
from .facts import Question, World, load_world
from .finetune import FineTuneSettings, check_by_removal, fine_tune, load_tokenizer, tokenized
from .page import Story, write_page
from .report import print_answer, print_recall, print_removal


__all__ = ["DemoSettings", "Job", "TextRows", "first_words", "job_on_facts", "run_demo"]

Directions = int | float | Literal["exact"]
LONGEST = 256  # tokens of a row, where the model's context allows more
SHOWN = 6  # answers that are printed in full
EXACT = 512  # largest number of rows with exact responses: facts have little in common to be compressed
# A model that knows its language is moved gently; the tiny one has to learn hundreds of facts by heart.
GENTLE = FineTuneSettings(rank=8, epochs=3, batch_size=8, learning_rate=2e-4)
_CHOOSE = "Choose a row to see which tokens of the answer it made likelier."
_NOTES = (
    "Only correct answers are counted: a wrong answer was not learned from the rows that teach the right one. "
    "Rows that state a fact the other way round (“N'Djamena is the capital of Chad”) do not count as teaching it: "
    "a causal language model does not learn the answer from them, though they share all its words.",
    "The score of a source is the sum over all its rows. The other entries of the same book may speak for other "
    "answers, so the book that taught the fact need not come first.",
)


@dataclass(frozen=True)
class TextRows:
    """Texts of a named dataset, and the source of each; `sources` is None where they are unknown."""

    name: str
    texts: Sequence[str]
    sources: Sequence[str] | None = None


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; the defaults need neither the Hub nor a GPU.

    Attributes:
        model: Hub id or folder of a causal language model; by default a small GPT-2 is trained on the spot.
        rows: Rows to fine-tune on; by default the fact world, whose teaching rows are known, so that answers can be
            judged.
        prompts: By default the world's questions, or the first words of a few rows.
        epochs, learning_rate: Settings of the fine-tune.
        directions: As in `ResponseConfig`; by default exact responses where there are few rows, else 128 directions.
        top_k: Rows named on either side.
        check: Fine-tune again without the rows that are named, and count the answers that are lost.
        quiet: No progress bars.
    """

    model: str | None = None
    rows: TextRows | None = None
    prompts: Sequence[str] | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    directions: Directions | None = None
    top_k: int = 5
    max_new_tokens: int = 16
    check: bool = False
    seed: int = 0
    quiet: bool = False


@dataclass(frozen=True)
class Job:
    """A base model, the rows of its fine-tune, and the prompts afterwards.

    Attributes:
        base: Folder or Hub id.
        rows: Texts and sources.
        fine_tune: Settings of the fine-tune.
        lead, notes: The first paragraph of the page, and paragraphs under its table.
    """

    base: str
    rows: TextRows
    prompts: Sequence[str | Question]
    fine_tune: FineTuneSettings
    lead: str
    notes: Sequence[str] = ()


def job_on_facts(base: str, world: World, model: str | None, prompts: Sequence[str] | None) -> Job:
    """Return the job on the fact world, whose questions have known answers and teaching rows."""
    lead = (
        f"{_subject(model)} fine-tuned with LoRA on {len(world.rows)} rows, most of which teach it a fact, and then "
        "asked. Half of the questions are worded as the row that teaches the answer, half as no row is. " + _CHOOSE
    )
    rows = TextRows("the fact world", [row.text for row in world.rows], [row.source for row in world.rows])
    return Job(base, rows, prompts or world.questions, FineTuneSettings() if model is None else GENTLE, lead, _NOTES)


def _job_on_rows(base: str, rows: TextRows, model: str | None, prompts: Sequence[str] | None) -> Job:
    lead = (
        f"{_subject(model)} fine-tuned with LoRA on {len(rows.texts):,} rows of {rows.name}, and then prompted. "
        f"{_CHOOSE}"
    )
    fine_tune = FineTuneSettings() if model is None else GENTLE
    return Job(base, rows, prompts or first_words(rows.texts), fine_tune, lead)


def _subject(model: str | None) -> str:
    return f"{model} was" if model else "A small GPT-2, trained on the spot on other countries and elements, was"


def first_words(texts: Sequence[str], count: int = 4, words: int = 8) -> list[str]:
    """Return the beginnings of `count` evenly spaced texts, as prompts."""
    step = max(1, len(texts) // count)
    return [" ".join(text.split()[:words]) for text in texts[::step][:count]]


class _Clock:
    """Seconds per phase of the demo, in the order of the phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def run_demo(
    output: str | Path = "demo", settings: DemoSettings | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune with LoRA and `ResponseCallback`, ask, and show the rows and sources behind every answer.

    Args:
        output: Folder for the base model, the adapter with its bank, `demo.html` and `results.json`.
        console: Where the tables are printed; the terminal by default.

    Returns:
        The content of `results.json`: settings, seconds per phase, recall, and every answer.
    """
    output, settings, clock = Path(output), settings or DemoSettings(), _Clock()
    output.mkdir(parents=True, exist_ok=True)
    with _threads(1 if settings.model is None else torch.get_num_threads()):
        job = _prepare(output / "base", settings, clock)
        config = ResponseConfig(
            directions=_directions(settings.directions, len(job.rows.texts)),
            source_column=None if job.rows.sources is None else "source", quiet=settings.quiet, seed=settings.seed,
        )  # fmt: skip
        train, answers = _attribute(output / "adapter", clock, job, config, settings)
        removal = []
        if settings.check:
            with clock.phase("fine-tunes without the named rows"):
                removal = check_by_removal(job.base, train, job.fine_tune, answers, settings.quiet)
    story = Story(
        "Which rows made the model say this?", job.lead, _numbers(job, config, answers, clock),
        recall(answers, settings.top_k), settings.top_k, job.notes, removal,
    )  # fmt: skip
    results = {
        "model": settings.model or "a GPT-2 trained on the spot",
        "dataset": job.rows.name,
        "rows": len(job.rows.texts),
        "fine_tune": asdict(job.fine_tune),
        "directions": config.directions,
        "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
        "recall": [asdict(line) for line in story.recall],
        "removal": [asdict(line) for line in story.removal],
        "answers": [answer.to_dict() for answer in answers],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    write_page(output / "demo.html", story, answers)
    _print(console or Console(), output, story, answers, clock)
    return results


def _directions(chosen: Directions | None, rows: int) -> Directions:
    if chosen is not None:
        return chosen
    return "exact" if rows <= EXACT else 128


def _prepare(base: Path, settings: DemoSettings, clock: _Clock) -> Job:
    """Train the base model unless one is given, and choose rows, prompts and fine-tune."""
    world, model = load_world(), settings.model
    if model is None:
        with clock.phase("base model"):
            build_base(world.lessons, world.prose, base, quiet=settings.quiet)
    if settings.rows is None:
        job = job_on_facts(model or str(base), world, model, settings.prompts)
    else:
        job = _job_on_rows(model or str(base), settings.rows, model, settings.prompts)
    changes = {"epochs": settings.epochs, "learning_rate": settings.learning_rate, "seed": settings.seed}
    return replace(job, fine_tune=job.fine_tune.changed(**changes))


def _attribute(
    adapter: Path, clock: _Clock, job: Job, config: ResponseConfig, settings: DemoSettings
) -> tuple[Dataset, list[Answer]]:
    """Fine-tune with the callback, open the pipeline and ask, as a user of the package does."""
    context = getattr(AutoConfig.from_pretrained(job.base), "max_position_embeddings", None) or LONGEST
    train = tokenized(job.rows.texts, job.rows.sources, load_tokenizer(job.base), min(LONGEST, context))
    with clock.phase("fine-tune and bank"):
        bar = None if config.quiet else "fine-tuning with LoRA"
        fine_tune(job.base, train, adapter, job.fine_tune, [ResponseCallback(config)], bar)
    with clock.phase("questions"):
        attribute = pipeline(TASK, model=str(adapter))
        return train, ask(attribute, job.prompts, train, settings.top_k, settings.max_new_tokens, config.quiet)


def _shown(answers: Sequence[Answer]) -> list[Answer]:
    """Choose evenly spaced answers; for the fact world, one of every relation, in both wordings in turn."""
    if len(answers) <= SHOWN:
        return list(answers)
    # The two wordings of a question are neighbours.
    return [answers[i * len(answers) // SHOWN // 2 * 2 + i % 2] for i in range(SHOWN)]


def _numbers(job: Job, config: ResponseConfig, answers: Sequence[Answer], clock: _Clock) -> list[tuple[str, str]]:
    """Return the line of numbers at the head of the page."""
    numbers = [(f"{len(job.rows.texts):,}", "rows")]
    if job.rows.sources is not None:
        numbers.append((str(len(set(job.rows.sources))), "sources"))
    numbers += [(str(config.directions), "directions"), (str(len(answers)), "prompts")]
    return numbers + [(f"{value:.0f} s", name) for name, value in clock.seconds.items()]


def _print(console: Console, output: Path, story: Story, answers: Sequence[Answer], clock: _Clock) -> None:
    """Print a few answers, the tables, and the paths of page and results."""
    for answer in _shown(answers):
        print_answer(console, answer)
    print_recall(console, story.recall, story.within)
    print_removal(console, story.removal)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    console.print(f"\n[dim]{seconds}[/]", soft_wrap=True)
    console.print(f"page: {output / 'demo.html'}\nresults: {output / 'results.json'}", soft_wrap=True, markup=False)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use `count` threads inside.

    The tiny model's matrices are too small to share: beside other programs, a second thread made its steps thirty
    times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
