"""The same bank however training is run: every configuration against the plain run of one process.

    python scripts/accelerate_table.py [--ranks 1 2 4] [--only NAME ...]

Each line is a real fine-tune of a tiny GPT-2 with LoRA in float64 (24 rows, global batch of four, three epochs),
started by torchrun over gloo on CPUs. Printed are the largest differences, relative to the largest value: of the
trained weights and of the scores from the same configuration on one rank (where training ended with the same weights,
the bank must be the same); of the scores from the plain run, where mathematics says that the configuration changes
nothing; and from those of the bank that one process builds of the record. The last column: how far the weights of a
step's tokens are from adding up to one, as those of a mean must.
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

from tests.ranks import SETTINGS  # noqa: E402


# What does not change the training, and hence not the bank.
NEUTRAL = {
    "plain", "accumulated", "padded to the context", "two workers", "dispatched", "evaluated", "saved", "resumed",
    "activations checkpointed", "float32", "bf16 autocast", "compiled, eager", "compiled, inductor",
}  # fmt: skip
FOUR_RANKS = {"plain", "dispatched", "clipped", "smoothed labels", "probes", "streamed", "wrapped around", "stream"}
ONE_RANK = {"compiled, eager", "compiled, inductor", "failing"}  # slow, or no configuration


def run(ranks: int, names: list[str], folder: Path) -> None:
    """One torchrun for all configurations."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FWDATTR_REBUILD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m",
         "tests.ranks", str(folder), *names],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--only", nargs="+", default=[name for name in SETTINGS if name != "failing"])
    options = parser.parse_args()
    started, rows = time.time(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for ranks in sorted({1, *options.ranks}):
            wanted = [n for n in options.only if ranks == 1 or (n not in ONE_RANK and (ranks < 4 or n in FOUR_RANKS))]
            names = ["plain", *(n for n in wanted if n != "plain")]
            run(ranks, names, folder)
            plain = torch.load(folder / "plain-1.pt")
            for name in names:
                found, alone = (torch.load(folder / f"{name}-{count}.pt") for count in (ranks, 1))
                trained = deviation(found["weights"], alone["weights"])
                same = found["rows"] == alone["rows"]
                line = {
                    "configuration": name,
                    "ranks": ranks,
                    "weights against one rank": f"{trained:.0e}" if same else "other batches",
                    "against one rank": f"{deviation(found['scores'], alone['scores']):.0e}" if same else "",
                    "against plain": f"{deviation(found['scores'], plain['scores']):.0e}" if name in NEUTRAL else "",
                    "against one process's passes": f"{deviation(found['scores'], found['alone']):.0e}",
                    "tokens' weights": f"{found['unit']:.0e}",
                }
                rows.append(line)
    report("accelerate", "The same bank however training is run: relative differences of scores", rows, started)


if __name__ == "__main__":
    main()
