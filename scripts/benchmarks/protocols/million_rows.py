"""The best rows of a million: how long the top k take once the derivatives are there, what is read, and memory.

Coordinates are random numbers, so nothing but time, bytes and memory is shown. The first query verifies the shards'
hashes; the ones that are timed find the file in the system's page cache, as a bank in use does.
"""

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hf_fwdattr import ResponseBank
from hf_fwdattr.query.ranking import rank

from ..report.results import report
from ..synthetic import synthetic_bank


TOP, QUERIES = 10, 20


def run(rows: int = 1_000_000, directions: int = 128) -> None:
    started, lines = time.time(), []
    for dtype in ("float32", "bfloat16"):
        for count in (rows // 10, rows):
            with tempfile.TemporaryDirectory() as scratch:
                bank = synthetic_bank(Path(scratch) / "bank", count, directions, directions, dtype=dtype)
                size = {"float32": 4, "bfloat16": 2}[dtype]
                line = {"rows": count, "directions": directions, "stored as": dtype} | measured(bank)
                lines.append(line | {"read MB": round(count * (directions * size + 12) / 1e6)})
    report(
        "million_rows", f"Top {TOP} of many rows after the directional derivatives", lines, started,
        threads=torch.get_num_threads(), peak_MiB=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )  # fmt: skip


def measured(bank: ResponseBank) -> dict[str, Any]:
    """Return the times of a query, and by how much memory grew after the first."""
    generator, spent, processor, memory, first = torch.Generator().manual_seed(1), [], [], 0, 0.0
    for number in range(QUERIES + 1):
        derivatives = torch.randn(1, 64, bank.manifest.directions, generator=generator)
        began, clock = time.perf_counter(), time.process_time()
        rank(derivatives, bank.coordinates(checked=False), TOP)
        if number:  # the first query verifies the shards
            spent.append(1000 * (time.perf_counter() - began))
            processor.append(1000 * (time.process_time() - clock))
        else:
            first, memory = time.perf_counter() - began, anonymous()
    return {
        "median ms": round(statistics.median(spent), 1), "worst ms": round(max(spent), 1),
        "processor's ms": round(statistics.median(processor), 1), "first query s": round(first, 2),
        "memory grew by MiB": round((anonymous() - memory) / 1024, 1),
    }  # fmt: skip


def anonymous() -> int:
    """Return the KiB of this process's memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
