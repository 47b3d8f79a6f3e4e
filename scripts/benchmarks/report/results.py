"""Result files: one JSON file a measurement, with its title, its rows, the machine and the wall time."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


__all__ = ["FOLDER", "load_result", "report", "result_name"]

FOLDER = Path(__file__).parents[1] / "results"


def result_name(protocol: str, world: str) -> str:
    """Return the name of a protocol's result on a world."""
    return f"{protocol}_{world}".replace("-", "_")


def load_result(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Return a result file.

    Raises:
        FileNotFoundError: there is no such result.
    """
    return json.loads(((folder or FOLDER) / f"{name}.json").read_text(encoding="utf-8"))


def report(name: str, title: str, rows: list[dict[str, Any]], started: float, **facts: Any) -> None:
    """Print rows as a table, and write `<name>.json` with the facts beside them, the machine and the wall time.

    Args:
        started: `time.time()` at the beginning of the measurement.
    """
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    facts |= {"wall_s": round(time.time() - started), "machine": machine}
    for key, value in facts.items():
        print(f"{key}: {value}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"title": title, "rows": rows} | facts, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
