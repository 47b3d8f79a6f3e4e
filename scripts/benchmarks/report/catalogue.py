"""Catalogue of the result files: command, columns of the table, and picture of each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import pictures


__all__ = ["RESULTS", "Result"]


@dataclass(frozen=True)
class Result:
    """A result file, as `catalogue.json` describes it.

    Attributes:
        command: arguments of `python -m benchmarks`, or a whole command line.
        columns: in the words of `tables`; all if empty.
        picture: what the picture shows; none if empty.
        draw: name of the function of `pictures` that draws it; empty if the measurement itself does.
    """

    command: str
    columns: str = ""
    picture: str = ""
    draw: str = ""

    @property
    def line(self) -> str:
        """The command line."""
        return self.command if self.command.startswith("bash ") else f"python -m benchmarks {self.command}"

    @property
    def drawing(self) -> Callable[[dict[str, Any], str], None] | None:
        """Function (result, name of the file) that draws the picture."""
        return getattr(pictures, self.draw) if self.draw else None


_ENTRIES = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
RESULTS = {name: Result(**entry) for name, entry in _ENTRIES.items()}
