"""Write RESULTS.md and the cards in model_cards/ from the result files; --check only compares."""

import sys

from ..report.catalogue import RESULTS
from ..report.pages import pages
from ..report.results import load_result


def run(check: bool = False, pictures: bool = False) -> int:
    """Return 1 if `check` finds a stale file."""
    if pictures:
        for name, entry in RESULTS.items():
            if entry.drawing is not None:
                entry.drawing(load_result(name), name)
    stale = 0
    for path, text in pages():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{path} is stale: run `python -m benchmarks report`", file=sys.stderr)
            stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return stale
