"""RESULTS.md and the cards in model_cards/, made from the result files.

`RESULTS.md.jinja` and `card.md.jinja` hold the prose; every table, picture and number beside it comes from `results/`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hf_fwdattr.bank.card import with_section
from hf_fwdattr.bank.verification import MANIFEST, read_manifest

from .catalogue import RESULTS
from .results import load_result
from .tables import table


__all__ = ["WORLDS", "WorldCard", "pages", "show"]

ROOT = Path(__file__).parents[3]
CARDS, FROM_CARD = ROOT / "model_cards", "../../scripts/benchmarks/"
_MARKED = re.compile(r"(<!-- result: (\w+) -->\n).*?(<!-- /result -->)", re.DOTALL)
_ELSEWHERE = ("title", "rows", "wall_s", "machine", "tried", "settings")  # shown in their own place, or too long


@dataclass(frozen=True)
class WorldCard:
    """Card of a world that methods were measured on.

    Attributes:
        name: of the card's folder.
        about: what is trained on what, in a few sentences.
        results: names of the result files that it shows.
        base: repository of the base model on the Hub; None if it is trained on the spot.
        notes: what a reader of the tables should know, one sentence each.
    """

    name: str
    title: str
    about: str
    results: tuple[str, ...]
    base: str | None = None
    library: str = "peft"
    notes: tuple[str, ...] = ()


WORLDS = tuple(WorldCard(**entry) for entry in json.loads((Path(__file__).parent / "cards.json").read_text()))


def pages() -> Iterator[tuple[Path, str]]:
    """Yield every generated file, with the text that it should have."""
    text = _template("RESULTS.md.jinja").render(show=show, fact=fact)
    yield ROOT / "scripts" / "benchmarks" / "RESULTS.md", text
    for path in sorted(CARDS.glob(f"*/{MANIFEST}")):  # cards of banks: their section, and results between two marks
        card, folder = path.with_name("README.md"), path.parent
        text = _MARKED.sub(
            lambda found: f"{found[1]}\n{show(found[2], FROM_CARD)}\n\n{found[3]}", card.read_text("utf-8")
        )
        yield card, with_section(text, read_manifest(folder), f"me/{folder.name}")
    for world in WORLDS:
        found = [(load_result(name)["title"], show(name, FROM_CARD)) for name in world.results]
        yield CARDS / world.name / "README.md", _template("card.md.jinja").render(world=world, results=found)


def show(name: str, prefix: str = "") -> str:
    """Return a result as Markdown: the command, the table, the numbers beside it, and the picture.

    Args:
        prefix: of the path to `results/`.
    """
    result, entry = load_result(name), RESULTS[name]
    parts = [f"`{entry.line}`; {result['wall_s']:,} s on {result['machine']}; [data]({prefix}results/{name}.json)"]
    parts.append(table(result["rows"], entry.columns).rstrip())
    beside = {key: value for key, value in result.items() if key not in _ELSEWHERE and isinstance(value, int | float)}
    if beside:
        parts.append("; ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in beside.items()))
    if entry.picture:
        parts.append(f"![{entry.picture}]({prefix}results/{name}.png)")
    return "\n\n".join(parts)


def fact(name: str, key: str, digits: int = 3, **row: Any) -> str:
    """Return one number: of the first row with these values, or beside the rows."""
    result = load_result(name)
    if row:
        result = next(line for line in result["rows"] if all(line[k] == v for k, v in row.items()))
    return _number(result[key], digits)


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string((Path(__file__).parent / name).read_text(encoding="utf-8"))
