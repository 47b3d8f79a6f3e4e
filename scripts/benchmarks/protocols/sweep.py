"""Sweep over the causal and sequence-classification classes of transformers: scores by conservation, or a refusal.

Every class that can be built tiny is trained with plain LoRA, DoRA, all Linears, a trained head, gradient accumulation
and padding on the left. Under plain SGD with small steps the scores of all rows must sum to what the training changed,
to 1 %, or the training is refused before its first step. Cases that are in `sweep.jsonl` are kept, so that a run goes
on where another ended; `--again` runs named verdicts or classes anew. About two seconds a case.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..report import results, support
from ..sweep import CASES, TOLERANCE, run_case
from ..tiny_models import KINDS, class_names


NAME = "sweep.jsonl"


def run(classes: tuple[str, ...] = (), cases: tuple[str, ...] = (), again: tuple[str, ...] = ()) -> int:
    torch.set_num_threads(1)
    path = results.FOLDER / NAME
    lines = {key(line): line for line in load(path)}
    for case in cases or CASES:
        for kind in KINDS:
            for name in class_names(kind):
                known = lines.get((kind, name, case))
                repeated = known is not None and ({known["verdict"], name, "all"} & set(again))
                wanted = classes or CASES[case].get("classes", (name,))
                if name not in wanted or (known is not None and not repeated):
                    continue
                gc.freeze()  # what is imported is not searched for garbage, as Accelerate does at each training
                line = lines[(kind, name, case)] = run_case(kind, name, case)
                print(json.dumps(line), flush=True)
                save(path, lines)
    counts = Counter((line["case"], line["verdict"]) for line in lines.values())
    for (case, verdict), count in sorted(counts.items()):
        print(f"{case:14} {verdict:12} {count}")
    print(f"right: the sum of scores is that of the change to {TOLERANCE:.0%}; wrote {path}", file=sys.stderr)
    return int(any(line["verdict"] in ("wrong", "late", "crash") for line in lines.values()))


def run_list(check: bool = False) -> int:
    """Write the list of classes in the trainer's README from the result of the sweep; --check only compares."""
    page = support.PAGE.read_text(encoding="utf-8")
    text = support.updated(page, load(results.FOLDER / NAME))
    if text == page:
        return 0
    if check:
        print(f"{support.PAGE} is stale: run `python -m benchmarks sweep_list`", file=sys.stderr)
        return 1
    support.PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {support.PAGE}")
    return 0


def key(line: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a line is about: kind, class and case."""
    return line["kind"], line["class"], line["case"]


def load(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a result file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def save(path: Path, lines: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """Write the lines, sorted, so that a later run changes only its own."""
    order = sorted(lines, key=lambda one: (one[0], one[1], list(CASES).index(one[2])))
    path.write_text("".join(json.dumps(lines[one]) + "\n" for one in order), encoding="utf-8")
