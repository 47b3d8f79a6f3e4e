"""Writes the tables of a Markdown file from scripts/results/*.json; --check only compares, and fails if one is stale.

    python scripts/tables.py [--check] [FILE ...]        # by default README.md and the cards in model_cards

A table stands between two lines, which stay:

    <!-- table: lds_lora | method; LDS **; low..high 95 %; kept as score variance kept -->
    <!-- /table -->

After the name of the result file come the columns: a key of its rows, `as` another heading, `low..high` for a range
under the heading that follows it, a number of digits after a colon (`LDS:2`), and ` **` where the best value is set in
bold. Without columns all are shown. `+ facts` at the end adds a line with what the file says beside its rows.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*/README.md"))]
RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- table: (?P<spec>.*?) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
_COLUMN = re.compile(r"^(?P<key>.+?)(?::(?P<digits>\d))?(?: as (?P<heading>.+?))?(?P<best> \*\*)?$")


def shown(value: Any, digits: int) -> str:
    """A cell: numbers rounded, nothing for what is missing."""
    if value is None or value == "-":
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value).replace("|", "\\|")
    return f"{value:.{digits}f}"


class Column:
    """One column, from its words in the marker."""

    def __init__(self, text: str):
        found = _COLUMN.match(text.strip())
        if found is None:
            raise ValueError(f"column {text!r} cannot be read")
        self.key, self.best = found["key"], bool(found["best"])
        self.digits = int(found["digits"] or 3)
        self.heading = found["heading"] or self.key
        self.range = re.fullmatch(r"(\S+)\.\.(\S+) (.+)", self.key)
        if self.range:
            self.heading = found["heading"] or self.range[3]

    def cell(self, row: dict[str, Any]) -> str:
        """What it shows of a row."""
        if self.range:
            low, high = (shown(row.get(self.range[n]), self.digits) for n in (1, 2))
            return f"{low} to {high}" if low else ""
        return shown(row.get(self.key), self.digits)


def table(result: dict[str, Any], columns: list[Column]) -> str:
    """Markdown of a result's rows.

    Raises:
        KeyError: a column that no row has.
    """
    rows = result["rows"]
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = columns or [Column(key) for key in keys]
    for column in columns:
        wanted = column.range.groups()[:2] if column.range else (column.key,)
        for key in wanted:
            if key not in keys:
                raise KeyError(f"no row has {key!r}; there are {', '.join(keys)}")
    lines = ["| " + " | ".join(column.heading for column in columns) + " |", "|---" * len(columns) + "|"]
    tops = {}
    for column in columns:
        numbers = [row[column.key] for row in rows if column.best and isinstance(row.get(column.key), int | float)]
        tops[column.key] = max(numbers) if numbers else None
    for row in rows:
        cells = []
        for column in columns:
            text = column.cell(row)
            best = column.best and tops[column.key] is not None and row.get(column.key) == tops[column.key]
            cells.append(f"**{text}**" if best else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rendered(text: str, results: Path = RESULTS) -> str:
    """A file's text with every table made anew.

    Raises:
        FileNotFoundError: there is no such result.
    """

    def anew(block: re.Match[str]) -> str:
        spec = block["spec"].strip()
        facts = spec.endswith("+ facts")
        name, _, columns = spec.removesuffix("+ facts").partition("|")
        result = json.loads((results / f"{name.strip()}.json").read_text(encoding="utf-8"))
        body = table(result, [Column(part) for part in columns.split(";") if part.strip()])
        if facts:
            said = {key: value for key, value in result.items() if key not in ("title", "rows")}
            body += "\n" + "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in said.items()) + "\n"
        return block[1] + "\n" + body + "\n" + block[4]

    return _BLOCK.sub(anew, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    stale = 0
    for path in options.files or FILES:
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new == old:
            continue
        if options.check:
            print(f"{path} is stale: run python scripts/tables.py", file=sys.stderr)
            stale += 1
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
