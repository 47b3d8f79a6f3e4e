"""Tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..bank.card import quality_text
from ..bank.printable import printable
from ..bank.schema import Manifest


__all__ = ["attribution_table", "bank_table", "quality_table"]

_NARROW = 60  # columns; narrower terminals get lines instead of tables
_LONGEST = 160  # characters of a row that are shown


def attribution_table(prompt: str, result: Mapping[str, Any], text_column: str) -> None:
    """Print an output with the rows and sources behind it.

    Args:
        result (`AttributionResult`): the pipeline's result.
        text_column (`str`): the column of a row to show.
    """
    console = Console()
    answer = Text(printable(prompt, lines=True), style="bold", overflow="fold")
    output = result["generated_text"] if "generated_text" in result else f"\n{result['label']}"
    console.print(answer.append(printable(output, lines=True), style="not bold cyan"))
    lines = [
        (line["score"], line["std"], str(line["row"]), line["source"] or "", _row_text(line["example"], text_column))
        for line in result["examples"]
    ]
    title = "rows, in nats of this output's log-likelihood"
    console.print(_scores(title, ("row", "source", "text"), lines, console.width))
    if result["sources"]:
        sources = [(line["score"], None, line["source"]) for line in result["sources"][:20]]
        console.print(_scores("sources", ("source",), sources, console.width))


def _row_text(example: Any, text_column: str) -> str:
    """Return what is shown of a row: its text, or its messages one after the other."""
    if example is None:
        return ""
    if not isinstance(example, Mapping) or text_column in example:
        return str(example[text_column] if isinstance(example, Mapping) else example)[:_LONGEST]
    parts: list[str] = []
    for name in ("prompt", "completion", "messages", "conversations"):
        value = example.get(name) or []
        parts += [value] if isinstance(value, str) else [str(m.get("content", m.get("value"))) for m in value]
    return (" | ".join(part.strip() for part in parts) or str(example))[:_LONGEST]


def _scores(title: str, names: Sequence[str], lines: Sequence[tuple[Any, ...]], width: int) -> RenderableType:
    """Return a table of scores; in a narrow terminal, paragraphs."""
    if width < _NARROW:
        text = Text(title, style="italic", overflow="fold")
        for score, std, *values in lines:
            text.append(f"\n{_shown(score, std)}", style="green" if score > 0 else "red")
            text.append("".join(f"  {printable(value)}" for value in values if value), style="none")
        return text
    table = Table(title=title, title_justify="left")
    table.add_column("score", justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right" if name == "row" else "left", overflow="fold")
    for score, std, *values in lines:
        shown = Text(_shown(score, std), style="green" if score > 0 else "red")
        table.add_row(shown, *(Text(printable(value), overflow="fold") for value in values))
    return table


def _shown(score: float, std: float | None) -> str:
    """Return a score with its standard deviation, where that is known and not zero."""
    return f"{score:+.4f} ± {std:.4f}" if std else f"{score:+.4f}"


def _pairs(title: str, values: Mapping[str, Any]) -> None:
    """Print names with their values."""
    console = Console()
    if console.width < _NARROW:
        console.print(Text(title, style="italic", overflow="fold"))
        for name, value in values.items():
            console.print(Text(f"{printable(name)}: {printable(value)}", overflow="fold"))
        return
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(printable(name)), Text(printable(value), overflow="fold"))
    console.print(table)


def bank_table(manifest: Manifest, checks: str = "verified") -> None:
    """Print the contents of a bank, and the checks that it passed."""
    rows, explained = manifest.dataset.rows, manifest.predictor_explained_variance
    exact = " (exact)" if manifest.exact else ""
    values = {
        "model": f"{manifest.model or 'not on the Hub'} {manifest.revision or ''}",
        "tracked weights": f"{len(manifest.parameters)} matrices, {manifest.size:,} parameters",
        "weights sha256": manifest.weights,
        "objective": manifest.objective,
        "optimizer": manifest.optimizer,
        "segments": ", ".join(f"{segment.length:.4g}" for segment in manifest.segments),
        "scores at": "the model's weights" if manifest.averaging == "none" else "the mean of the run's weights",
        "curvature samples": f"{manifest.curvature_samples} per segment",
        "directions": f"{manifest.directions}{exact} + {manifest.source_directions} for sources",
        "explained variance": f"{manifest.explained_variance:.3f} of held-out scores",
        "rows": f"{rows:,} from {manifest.dataset.repo or 'a local dataset'} {manifest.dataset.split or ''}",
        "sources": f"{len(manifest.sources)}",
        "stored of rows": _stored_of_rows(manifest),
        "gradient predictor": "none" if explained is None else f"explains {explained:.2f} of the scores",
        "size": f"{manifest.bytes / 2**20:.1f} MiB; {manifest.row_bytes / max(rows, 1):,.0f} bytes a row",
        "quality": quality_text(manifest.quality) or "not measured",
    }
    if manifest.notes:
        values["notes"] = "scores may be wrong: " + "; ".join(manifest.notes)
    _pairs(f"response bank, {printable(checks)}", values)


def _stored_of_rows(manifest: Manifest) -> str:
    if manifest.privacy.rows == "sources":
        return "nothing but their sources"
    stored = "ids, salted hashes and row codes" if manifest.row_codes else "ids and salted hashes"
    return f"{stored}, and their text" if manifest.privacy.text else f"{stored}, no text"


def quality_table(measured: Mapping[str, Any]) -> None:
    """Print the measured quality of a bank."""
    values = {name.replace("_", " "): quality_text(value) for name, value in measured.items()}
    _pairs("measured by retraining, and written into bank.json", values)
