"""The best rows of a million: how long the top k take after the readout, what is read, and what memory that needs.

    python scripts/million_rows.py [--rows 1000000] [--directions 128]

Coordinates are random numbers, so nothing but time, bytes and memory is shown. The first query verifies the shards'
hashes; the ones that are timed find the file in the system's page cache, as a bank in use does.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results import report

from hf_fwdattr import ResponseBank
from hf_fwdattr.bank.writing import write_bank
from hf_fwdattr.query.ranking import rank


TOP = 10
QUERIES = 20


def synthetic(folder: Path, rows: int, directions: int, dtype: str) -> ResponseBank:
    """A bank of random coordinates of so many rows, with one responding parameter per direction."""
    generator = torch.Generator().manual_seed(0)
    described = {
        "libraries": {}, "model": None, "revision": None, "weights": "0" * 64,
        "parameters": [{"name": "weight", "shape": [directions]}], "objective": "causal-lm", "optimizer": "adamw",
        "segments": [], "config": {}, "curvature_samples": 0, "directions": directions, "source_directions": 0,
        "source_scales": [], "exact": False, "explained_variance": 1.0, "dtype": dtype,
        "dataset": {"rows": rows, "tokenizer": None}, "sources": ["one", "two"], "salt": "0" * 32,
    }  # fmt: skip
    return write_bank(
        folder, described, [torch.eye(directions)], torch.randn(rows, directions, generator=generator), torch.arange(rows),
        torch.zeros(rows, 16, dtype=torch.uint8), torch.arange(rows) % 2,
    )  # fmt: skip


def anonymous() -> int:
    """KiB of this process's memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measured(folder: Path, rows: int, directions: int, dtype: str) -> dict:
    """One line of the table."""
    bank = ResponseBank(folder)
    generator = torch.Generator().manual_seed(1)
    spent, cpu, before = [], [], 0
    for number in range(QUERIES + 1):
        readout = torch.randn(1, 64, directions, generator=generator)
        began, clock = time.perf_counter(), time.process_time()
        ((best, worst),) = rank(readout, bank.coordinates(checked=False), TOP)
        if number:  # the first query verifies the shards
            spent.append(1000 * (time.perf_counter() - began))
            cpu.append(1000 * (time.process_time() - clock))
        else:
            first, before = time.perf_counter() - began, anonymous()
    assert len(best.scores) == len(worst.scores) == min(TOP, rows)
    element = 4 if dtype == "float32" else 2
    return {
        "rows": rows, "directions": directions, "stored as": dtype, "median ms": round(statistics.median(spent), 1),
        "worst ms": round(max(spent), 1), "processor's ms": round(statistics.median(cpu), 1),
        "first query s": round(first, 2), "read MB": round(rows * (directions * element + 12) / 1e6),
        "memory grew by MiB": round((anonymous() - before) / 1024, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--directions", type=int, default=128)
    options = parser.parse_args()
    started, lines = time.time(), []
    for dtype in ("float32", "bfloat16"):
        for rows in (options.rows // 10, options.rows):
            with tempfile.TemporaryDirectory() as scratch:
                synthetic(Path(scratch) / "bank", rows, options.directions, dtype)
                lines.append(measured(Path(scratch) / "bank", rows, options.directions, dtype))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report(
        "million_rows", f"Top {TOP} of many rows after the readout", lines, started,
        threads=torch.get_num_threads(), peak_MiB=peak,
    )  # fmt: skip


if __name__ == "__main__":
    main()
