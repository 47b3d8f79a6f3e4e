"""What the demo fine-tunes on what, and what it asks; whatever was not given is made on the spot."""

from collections.abc import Sequence
from dataclasses import dataclass

from .dataset import first_words, load_rows
from .facts import Question, World
from .finetune import FineTuneSettings


# A model that knows its language is moved gently; the tiny one has to learn hundreds of facts by heart.
GENTLE = FineTuneSettings(rank=8, epochs=3, batch_size=8, learning_rate=2e-4)
_CHOOSE = "Choose a row to see which tokens of the answer it made likelier."
NOTES = (
    "Only correct answers are counted: a wrong answer was not learned from the rows that teach the right one. "
    "Rows that state a fact the other way round (“N'Djamena is the capital of Chad”) do not count as teaching it: "
    "a causal language model does not learn the answer from them, though they share all its words.",
    "The score of a source is the sum over all its rows. The other entries of the same book may speak for other "
    "answers, so the book that taught the fact need not come first.",
)


@dataclass(frozen=True)
class Job:
    """A base model, the rows it is fine-tuned on, and the prompts it is asked afterwards.

    Attributes:
        base: Folder or Hub id.
        texts, sources: Rows, and where each is from; `sources` is None where nothing is known.
        settings: Of the fine-tune.
        lead: What this is, for the page.
        notes: What its table does and does not say.
    """

    base: str
    texts: Sequence[str]
    sources: Sequence[str] | None
    prompts: Sequence[str | Question]
    settings: FineTuneSettings
    lead: str
    notes: Sequence[str] = ()


def job_on_facts(base: str, world: World, model: str | None, prompts: Sequence[str] | None) -> Job:
    """The fact world, whose questions have known answers and teaching rows."""
    lead = (
        f"{_who(model)} fine-tuned with LoRA on {len(world.rows)} rows, most of which teach it a fact, and then "
        "asked. Half of the questions are worded as the row that teaches the answer, half as no row is. " + _CHOOSE
    )
    texts, sources = [row.text for row in world.rows], [row.source for row in world.rows]
    settings = FineTuneSettings() if model is None else GENTLE
    return Job(base, texts, sources, prompts or world.questions, settings, lead, NOTES)


def job_on_dataset(
    base: str,
    dataset: str,
    model: str | None,
    prompts: Sequence[str] | None,
    columns: tuple[str, str | None],
    split: str,
    rows: int | None,
) -> Job:
    """A data set of the user's, with the user's prompts or the first words of a few rows.

    `columns` are those of the text and of the source.
    """
    texts, sources = load_rows(dataset, split, *columns, rows)
    lead = f"{_who(model)} fine-tuned with LoRA on {len(texts):,} rows of {dataset}, and then prompted. {_CHOOSE}"
    settings = FineTuneSettings() if model is None else GENTLE
    return Job(base, texts, sources, prompts or first_words(texts), settings, lead)


def _who(model: str | None) -> str:
    return f"{model} was" if model else "A small GPT-2, trained on the spot on other countries and elements, was"
