"""Attribution results as one self-contained HTML page: no network, no script from elsewhere, everything escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .ask import Answer, NamedRow, Recall
from .finetune import Removal


__all__ = ["Story", "render", "shade", "visible", "write_page"]


@dataclass(frozen=True)
class Story:
    """The text and tables above the answers.

    Attributes:
        title: The title of the page.
        lead: One paragraph about the model, its rows and the questions.
        numbers: (value, what it counts), shown in a line.
        recall: Lines of the table that compares methods; empty for free prompts.
        within: The k of the table's second half.
        notes: Paragraphs under the table.
        removal: Lines of the table about retraining without the named rows; empty if that was not done.
    """

    title: str
    lead: str
    numbers: Sequence[tuple[str, str]] = ()
    recall: Sequence[Recall] = ()
    within: int = 5
    notes: Sequence[str] = ()
    removal: Sequence[Removal] = ()


def shade(score: float, largest: float) -> Markup:
    """Return the style of a token: blue where the row made it likelier, else orange, stronger for more nats."""
    share = 0.0 if largest <= 0 else min(abs(score) / largest, 1.0)
    side = "var(--helps)" if score > 0 else "var(--harms)"
    return Markup(f"background: color-mix(in srgb, {side} {round(100 * share)}%, transparent)")


def width(score: float, largest: float) -> Markup:
    """Return the style of a bar; the largest absolute score of its list has the full length."""
    share = 0.0 if largest <= 0 else min(abs(score) / largest, 1.0)
    return Markup(f"width: {100 * share:.1f}%")


def visible(token: str) -> str:
    """Return a token with visible line breaks and spaces, so that every token can be seen and chosen."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    return shown if shown.strip() else shown.replace(" ", "␣") or "∅"


def largest_token(answer: Answer) -> float:
    """Return the largest absolute token score of all named rows: one scale for the whole answer."""
    rows: Sequence[NamedRow] = [*answer.proponents, *answer.opponents]
    return max((abs(score) for row in rows for score in row.token_scores), default=0.0)


def largest_row(answer: Answer) -> float:
    """Return the largest absolute score of all named rows."""
    return max((abs(row.score) for row in [*answer.proponents, *answer.opponents]), default=0.0)


def render(story: Story, answers: Sequence[Answer]) -> str:
    """Render the page as a string of HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "shade": shade, "width": width, "visible": visible, "largest_token": largest_token, "largest_row": largest_row,
    }  # fmt: skip
    source = resources.files("hf_fwdattr.demo").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(story=story, answers=answers)


def write_page(path: Path, story: Story, answers: Sequence[Answer]) -> None:
    """Render the page into a file."""
    path.write_text(render(story, answers), encoding="utf-8")
