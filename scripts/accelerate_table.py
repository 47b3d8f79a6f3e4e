"""The same bank however training is run: every configuration against the plain run of one process.

    python scripts/accelerate_table.py [--ranks 1 2 4] [--only NAME ...] [--folder KEPT]

Each line is a real fine-tune of a tiny GPT-2 with LoRA in float64 (24 rows, global batch of four, three epochs),
started by torchrun over gloo on CPUs; "sharded" ones by FSDP2. Printed are the largest differences of scores,
relative to the largest score: of so many ranks from the same configuration on one (where they trained on the same
batches); from the plain run, where mathematics says that the configuration changes nothing; and from the bank that
one process builds of the record. Then the same of the trained weights of ranks and of one, where they trained on the
same batches: what training itself makes of them. The last column: how far the weights of a step's tokens are from
adding up to one, as those of a mean must.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import report


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.ranks import SETTINGS  # noqa: E402


# What does not change the training, and hence not the bank.
NEUTRAL = {
    "plain", "accumulated", "padded to the context", "two workers", "dispatched", "evaluated", "saved", "resumed",
    "activations checkpointed", "float32", "bf16 autocast", "compiled, eager", "compiled, inductor", "sharded",
    "sharded in one group, evaluated", "sharded, accumulated", "sharded, float32", "sharded, bf16", "sharded, saved",
    "sharded, resumed", "loaded in pieces",
}  # fmt: skip
FOUR_RANKS = {
    "plain", "float32", "dispatched", "clipped", "smoothed labels", "directions", "streamed", "wrapped around", "stream",
    "saved", "resumed", "sharded", "sharded, all weights", "sharded, float32",
    "loaded in pieces",
}  # fmt: skip
ONE_RANK = {"compiled, eager", "compiled, inductor"}  # slow
NONE = {"failing", "sharded, failing", "sharded, everything", "killed", "killed again", "revived"}  # for tests only


def run(ranks: int, names: list[str], folder: Path) -> None:
    """One torchrun for all configurations that were not run before."""
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


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def compared(name: str, ranks: int, folder: Path) -> dict[str, float]:
    """Of one run: differences by what from; only those that say something."""
    found, alone, plain = (
        torch.load(folder / f"{which}-{count}.pt") for which, count in ((name, ranks), (name, 1), ("plain", 1))
    )
    line = {"one process's passes": deviation(found["scores"], found["alone"]), "tokens": found["unit"]}
    if name in NEUTRAL:
        line["the plain run"] = deviation(found["scores"], plain["scores"])
    if ranks > 1 and found["rows"] == alone["rows"]:
        line[f"{ranks} ranks"] = deviation(found["scores"], alone["scores"])
        line["weights"] = deviation(found["weights"], alone["weights"])
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", default=[name for name in SETTINGS if name not in NONE])
    parser.add_argument("--folder", type=Path, help="keep the runs, and go on with those that are there")
    options = parser.parse_args()
    started, found = time.time(), {name: {} for name in dict.fromkeys(["plain", *options.only])}
    with tempfile.TemporaryDirectory() as scratch:
        folder, counts = options.folder or Path(scratch), sorted({1, *options.ranks})
        started = min([started, *(path.stat().st_mtime for path in folder.glob("*.pt"))])  # of runs that are there
        for ranks in counts:
            names = [n for n in found if ranks == 1 or (n not in ONE_RANK and (ranks < 4 or n in FOUR_RANKS))]
            run(ranks, names, folder)
            for name in names:
                for what, value in compared(name, ranks, folder).items():
                    found[name][what] = max(value, found[name].get(what, 0.0))
                if ranks > 1:
                    found[name].setdefault(f"{ranks} ranks", "other batches")
    columns = [*(f"{n} ranks" for n in counts[1:]), "the plain run", "one process's passes", "weights", "tokens"]
    rows = [{"configuration": name} | {key: shown(line.get(key)) for key in columns} for name, line in found.items()]
    report("accelerate", "The same bank however training is run: relative differences of scores", rows, started)


def shown(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else "0" if value == 0 else f"{value:.0e}"


if __name__ == "__main__":
    main()
