"""Where the scripts' figures go: a table on the terminal and a JSON file that the README's tables are made from."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


FOLDER = Path(__file__).parent / "results"


def report(name: str, title: str, rows: list[dict[str, Any]], started: float, **facts: Any) -> None:
    """Print rows as a table and write `results/<name>.json` with the machine and the wall time."""
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
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"title": title, "rows": rows} | facts, indent=2) + "\n")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
