"""Attribution results as tables in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..bank.printable import printable
from .ask import Answer, NamedRow, Recall
from .finetune import Removal


__all__ = ["print_answer", "print_recall", "print_removal"]


def _coloured(answer: Answer) -> Text:
    """Return prompt and answer, every token of the answer coloured by the score of the row that is named first."""
    text = Text(printable(answer.prompt, lines=True), style="dim")
    rows = answer.proponents or answer.opponents
    scores = rows[0].token_scores if rows else [0.0] * len(answer.tokens)
    most = max((abs(score) for score in scores), default=0.0) or 1.0
    for token, score in zip(answer.tokens, scores, strict=True):
        strength = "bold " if abs(score) > most / 2 else ""
        text.append(printable(token, lines=True), style=strength + ("blue" if score > 0 else "yellow"))
    if answer.correct is False and answer.question is not None:
        text.append(f"   (expected: {answer.question.answer})", style="red")
    return text


def _add_rows(table: Table, rows: Sequence[NamedRow], style: str) -> None:
    for row in rows:
        mark = "[green]teaches this[/]" if row.teaches else ""
        text, source = escape(printable(row.text)), escape(printable(row.source or ""))
        table.add_row(f"[{style}]{row.score:+.2f}[/]", text, source, mark)


def print_answer(console: Console, answer: Answer, rows: int = 3) -> None:
    """Print the answer, the first rows of either side, and the sources with the largest scores."""
    console.print()
    console.print(_coloured(answer))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("nats", justify="right")
    table.add_column("row", overflow="fold")
    table.add_column("source")
    table.add_column("")
    _add_rows(table, answer.proponents[:rows], "blue")
    _add_rows(table, answer.opponents[: max(1, rows - 2)], "yellow")
    console.print(table)
    if answer.sources:
        largest = sorted(answer.sources, key=lambda line: -abs(line[1]))[:4]
        sources = ", ".join(f"{escape(printable(source))} {score:+.2f}" for source, score in largest)
        console.print(f"[dim]sources: {sources}[/]")


def print_recall(console: Console, lines: Sequence[Recall], k: int = 5) -> None:
    """Print how often a row that teaches the fact is ranked first and in the top k, for every method."""
    if not lines:
        return
    methods = list(lines[-1].first)
    console.print()
    console.print("[bold]How often is a row that taught the fact named?[/] (correct answers only)")
    table = Table()
    table.add_column("question worded")
    table.add_column("correct", justify="right")
    for method in methods:
        table.add_column(f"{method}\nfirst / top {k}", justify="right")
    for line in lines:
        shares = [
            f"{100 * line.first[m]:.0f} % / {100 * line.top[m]:.0f} %" if m in line.first else "" for m in methods
        ]
        table.add_row(line.wording, f"{line.correct} of {line.asked}", *shares)
    console.print(table)


def print_removal(console: Console, lines: Sequence[Removal]) -> None:
    """Print the answers that remain after a fine-tune without the rows that a method ranks first."""
    if not lines:
        return
    console.print()
    console.print("[bold]Fine-tuned again without the row ranked first for every answer[/]")
    table = Table("left out")
    for column in ("rows", "answers still given", "change of log-likelihood"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(line.method, str(line.removed), f"{line.kept} of {line.asked}", f"{line.change:+.2f} nats")
    console.print(table)
