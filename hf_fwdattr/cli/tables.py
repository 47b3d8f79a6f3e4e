"""Tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bank.card import quality_text
from ..bank.schema import Manifest


__all__ = ["attribution_table", "bank_table", "quality_table"]


def attribution_table(prompt: str, result: Mapping[str, Any], text_column: str) -> None:
    """Print an output with the rows and sources behind it.

    Args:
        result (`AttributionResult`): the pipeline's result.
        text_column (`str`): the column of a row to show.
    """
    console = Console()
    console.print(f"[bold]{escape(prompt)}[/bold][cyan]{escape(result['generated_text'])}[/cyan]")
    rows = Table(title="rows, in nats of this output's log-likelihood", title_justify="left")
    for name in ("score", "row"):
        rows.add_column(name, justify="right")
    for name in ("source", "text"):
        rows.add_column(name)
    for line in result["examples"]:
        example = line["example"]
        text = str(example.get(text_column, example))[:160] if example is not None else ""
        colour = "green" if line["score"] > 0 else "red"
        score = f"[{colour}]{line['score']:+.4f}[/]"
        rows.add_row(score, str(line["row"]), escape(str(line["source"] or "")), escape(text))
    console.print(rows)
    if result["sources"]:
        sources = Table(title="sources", title_justify="left")
        sources.add_column("score", justify="right")
        sources.add_column("source")
        for line in result["sources"][:20]:
            sources.add_row(f"{line['score']:+.4f}", escape(line["source"]))
        console.print(sources)


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
    table = Table(show_header=False, title=f"response bank, {checks}", title_justify="left")
    for name, value in values.items():
        table.add_row(name, escape(value))
    Console().print(table)


def _stored_of_rows(manifest: Manifest) -> str:
    if manifest.privacy.rows == "sources":
        return "nothing but their sources"
    stored = "ids, salted hashes and row codes" if manifest.row_codes else "ids and salted hashes"
    return f"{stored}, and their text" if manifest.privacy.text else f"{stored}, no text"


def quality_table(measured: Mapping[str, Any]) -> None:
    """Print the measured quality of a bank."""
    table = Table(show_header=False, title="measured by retraining, and written into bank.json", title_justify="left")
    for name, values in measured.items():
        table.add_row(name.replace("_", " "), escape(quality_text(values)))
    Console().print(table)
