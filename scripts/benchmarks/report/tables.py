"""Markdown tables of result files.

Columns are written in one line, separated by semicolons: a key of the rows, `as` another heading, `low..high` for a
range under the heading that follows it, a number of digits after a colon (`LDS:2`), and ` **` where the best value is
set in bold. Without columns all keys are shown.
"""

import re
from typing import Any


__all__ = ["Column", "table"]

_COLUMN = re.compile(r"^(?P<key>.+?)(?::(?P<digits>\d))?(?: as (?P<heading>.+?))?(?P<best> \*\*)?$")


def _shown(value: Any, digits: int) -> str:
    if value is None or value == "-":
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value).replace("|", "\\|")


class Column:
    """One column, from its words."""

    def __init__(self, text: str):
        found = _COLUMN.match(text.strip())
        if found is None:
            raise ValueError(f"column {text!r} cannot be read")
        self.key, self.best, self.digits = found["key"], bool(found["best"]), int(found["digits"] or 3)
        self.range = re.fullmatch(r"(\S+)\.\.(\S+) (.+)", self.key)
        self.heading = found["heading"] or (self.range[3] if self.range else self.key)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the rows that the column shows."""
        return (self.range[1], self.range[2]) if self.range else (self.key,)

    def cell(self, row: dict[str, Any], best: Any = None) -> str:
        """Return the cell of a row, in bold if its value is `best`."""
        low, *high = (_shown(row.get(key), self.digits) for key in self.keys)
        text = f"{low} to {high[0]}" if high and low else low
        return f"**{text}**" if best is not None and row.get(self.key) == best else text


def table(rows: list[dict[str, Any]], columns: str = "") -> str:
    """Return a Markdown table.

    Raises:
        KeyError: a column that no row has.
    """
    keys = dict.fromkeys(key for row in rows for key in row)
    chosen = [Column(part) for part in columns.split(";") if part.strip()] or [Column(key) for key in keys]
    for key in (key for column in chosen for key in column.keys):
        if key not in keys:
            raise KeyError(f"no row has {key!r}; there are {', '.join(keys)}")
    lines = ["| " + " | ".join(column.heading for column in chosen) + " |", "|---" * len(chosen) + "|"]
    best = {}
    for column in chosen:
        numbers = [row[column.key] for row in rows if column.best and isinstance(row.get(column.key), int | float)]
        best[column.key] = max(numbers, default=None)
    for row in rows:
        lines.append("| " + " | ".join(column.cell(row, best[column.key]) for column in chosen) + " |")
    return "\n".join(lines) + "\n"
