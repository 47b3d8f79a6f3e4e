"""The same bank however training is run: every configuration against the plain run of one process.

Each line is a real fine-tune of a tiny GPT-2 with LoRA in float64 (24 rows, global batch of four, three epochs),
started by torchrun over gloo on CPUs; "sharded" ones by FSDP2. Printed are the largest differences of scores,
relative to the largest score: of so many ranks from the same configuration on one (where they trained on the same
batches); from the plain run, where mathematics says that the configuration changes nothing; and from the bank that
one process builds of the record. Then the same of the trained weights of ranks and of one, where they trained on the
same batches: what training itself makes of them. The last column: how far the weights of a step's tokens are from
adding up to one, as those of a mean must.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.helpers.ranks import SETTINGS

from ..report.results import report


ROOT = Path(__file__).parents[3]
# Configurations that do not change the training, and hence not the bank.
NEUTRAL = {
    "plain", "accumulated", "padded to the context", "two workers", "dispatched", "evaluated", "saved", "resumed",
    "activations checkpointed", "float32", "bf16 autocast", "compiled, eager", "compiled, inductor", "sharded",
    "sharded in one group, evaluated", "sharded, accumulated", "sharded, float32", "sharded, bf16", "sharded, saved",
    "sharded, resumed", "loaded in pieces",
}  # fmt: skip
FOUR_RANKS = {
    "plain", "float32", "dispatched", "clipped", "smoothed labels", "directions", "streamed", "wrapped around",
    "stream", "saved", "resumed", "sharded", "sharded, all weights", "sharded, float32", "loaded in pieces",
}  # fmt: skip
ONE_RANK = {"compiled, eager", "compiled, inductor"}  # slow
TESTS_ONLY = {"failing", "sharded, failing", "sharded, everything", "killed", "killed again", "revived"}
NAMES = tuple(name for name in SETTINGS if name not in TESTS_ONLY)


def run(ranks: tuple[int, ...] = (1, 2, 4), only: tuple[str, ...] = NAMES, folder: Path | None = None) -> None:
    started = time.time()
    lines: dict[str, dict[str, Any]] = {name: {} for name in dict.fromkeys(["plain", *only])}
    with tempfile.TemporaryDirectory() as scratch:
        kept, counts = folder or Path(scratch), sorted({1, *ranks})
        started = min([started, *(path.stat().st_mtime for path in kept.glob("*.pt"))])  # of runs that are there
        for count in counts:
            names = [n for n in lines if count == 1 or (n not in ONE_RANK and (count < 4 or n in FOUR_RANKS))]
            torchrun(count, names, kept)
            for name in names:
                for column, value in compared(name, count, kept).items():
                    lines[name][column] = max(value, lines[name].get(column, 0.0))
                if count > 1:
                    lines[name].setdefault(f"{count} ranks", "other batches")
    columns = [*(f"{n} ranks" for n in counts[1:]), "the plain run", "one process's passes", "weights", "tokens"]
    rows = [{"configuration": name} | {key: shown(line.get(key)) for key in columns} for name, line in lines.items()]
    report("accelerate_table", "The same bank however training is run: relative differences of scores", rows, started)


def torchrun(ranks: int, names: list[str], folder: Path) -> None:
    """Run all configurations that were not run before by one torchrun."""
    names = [name for name in names if not (folder / f"{name}-{ranks}.pt").exists()]
    if not names:
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FWDATTR_REBUILD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m",
         "tests.helpers.ranks", str(folder), *names],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def compared(name: str, ranks: int, folder: Path) -> dict[str, float]:
    """Return the differences of one run that say something."""
    own, alone, plain = (
        torch.load(folder / f"{which}-{count}.pt") for which, count in ((name, ranks), (name, 1), ("plain", 1))
    )
    line = {"one process's passes": deviation(own["scores"], own["rebuilt"]), "tokens": own["unit"]}
    if name in NEUTRAL:
        line["the plain run"] = deviation(own["scores"], plain["scores"])
    if ranks > 1 and own["rows"] == alone["rows"]:
        line[f"{ranks} ranks"] = deviation(own["scores"], alone["scores"])
        line["weights"] = deviation(own["weights"], alone["weights"])
    return line


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def shown(value: float | str | None) -> str:
    """Return a cell of the table."""
    return "" if value is None else value if isinstance(value, str) else "0" if value == 0 else f"{value:.0e}"
