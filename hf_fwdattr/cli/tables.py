"""Tables for people."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bank.card import quality_text
from ..bank.schema import Manifest


def attribution_table(prompt: str, result: dict[str, Any], text_column: str) -> None:
    """Print an output with the rows and sources behind it."""
    console = Console()
    console.print(f"[bold]{escape(prompt)}[/bold][cyan]{escape(result['generated_text'])}[/cyan]")
    rows = Table(title="rows, in nats of this output's log-likelihood", title_justify="left")
    for name, side in (("score", "right"), ("row", "right"), ("source", "left"), ("text", "left")):
        rows.add_column(name, justify=side)  # type: ignore[arg-type]
    for example in result["examples"]:
        shown = example["example"]
        text = str(shown.get(text_column, shown))[:160] if shown is not None else ""
        colour = "green" if example["score"] > 0 else "red"
        rows.add_row(
            f"[{colour}]{example['score']:+.4f}[/]",
            str(example["row"]),
            escape(str(example["source"] or "")),
            escape(text),
        )
    console.print(rows)
    if result["sources"]:
        sources = Table(title="sources", title_justify="left")
        sources.add_column("score", justify="right")
        sources.add_column("source")
        for line in result["sources"][:20]:
            sources.add_row(f"{line['score']:+.4f}", escape(line["source"]))
        console.print(sources)


def bank_table(manifest: Manifest, seen: str = "verified") -> None:
    """Print what a bank holds, and how far it was looked at."""
    size = sum(file.size for file in manifest.files)
    each = sum(file.size for file in manifest.files if file.kind in ("coordinates", "responses", "text"))
    table = Table(show_header=False, title=f"response bank, {seen}", title_justify="left")
    rows = manifest.dataset.rows
    for name, value in (
        ("model", f"{manifest.model or 'not on the Hub'} {manifest.revision or ''}"),
        ("responding weights", f"{len(manifest.parameters)} matrices, {manifest.size:,} parameters"),
        ("weights sha256", manifest.weights),
        ("objective", manifest.objective),
        ("optimizer", manifest.optimizer),
        ("segments", ", ".join(f"{segment.length:.4g}" for segment in manifest.segments)),
        ("read at", "the model's weights" if manifest.averaging == "none" else "the mean of the run's weights"),
        ("curvature samples", f"{manifest.curvature_samples} per segment"),
        (
            "directions",
            f"{manifest.directions}{' (exact)' if manifest.exact else ''} + {manifest.source_directions} for sources",
        ),
        ("kept variance", f"{manifest.explained_variance:.3f} of held-out scores"),
        ("rows", f"{rows:,} from {manifest.dataset.repo or 'a local dataset'} {manifest.dataset.split or ''}"),
        ("sources", f"{len(manifest.sources)}"),
        ("kept of rows", _kept(manifest)),
        (
            "first look",
            "none"
            if manifest.predictor_explained_variance is None
            else f"explains {manifest.predictor_explained_variance:.2f} of the scores",
        ),
        ("size", f"{size / 2**20:.1f} MiB; {each / max(rows, 1):,.0f} bytes a row"),
        ("quality", quality_text(manifest.quality) or "not measured"),
    ):
        table.add_row(name, escape(value))
    Console().print(table)


def _kept(manifest: Manifest) -> str:
    if manifest.privacy.rows == "sources":
        return "nothing but their sources"
    kept = "ids, salted hashes and own responses" if manifest.row_codes else "ids and salted hashes"
    return f"{kept}, and their text" if manifest.privacy.text else f"{kept}, no text"


def quality_table(measured: dict[str, Any]) -> None:
    """Print what was measured of a bank."""
    table = Table(show_header=False, title="measured by retraining, and written into bank.json", title_justify="left")
    for name, values in measured.items():
        table.add_row(name.replace("_", " "), escape(quality_text(values)))
    Console().print(table)
