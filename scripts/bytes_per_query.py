"""Bytes downloaded for one query of a bank on the Hub, against the bank's size.

A synthetic bank is pushed to the server of the tests and read back from an empty cache with the real client:
python scripts/bytes_per_query.py --rows 100000 --k 128 --parameters 1000000 --sources 32 --dtype bfloat16
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.hub_server import HUB, TOKEN


os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from results import report

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.writing import write_bank
from hf_fwdattr.query.ranking import rank
from tests.bank.test_bank import described


def synthetic(folder: Path, rows: int, k: int, parameters: int, sources: int, dtype: str, text: int) -> ResponseBank:
    """A bank of that size, of random numbers; with so many bytes of text to each row."""
    generator = torch.Generator().manual_seed(0)
    shape = dict(
        parameters=[{"name": "lora_B.weight", "shape": [parameters]}], directions=k, source_directions=sources, dtype=dtype,
        source_scales=[1.0] * sources, sources=[f"source {i}" for i in range(sources)], dataset={"rows": rows},
        privacy={"text": text > 0},
    )  # fmt: skip
    return write_bank(
        folder, described(**shape), [torch.randn(n, parameters, generator=generator) for n in (k, sources)],
        torch.randn(rows, k, generator=generator), torch.arange(rows),
        torch.randint(0, 256, (rows, 16), generator=generator).to(torch.uint8), torch.arange(rows) % sources,
        texts=(f"{row:{text}}" for row in range(rows)) if text else None,
    )  # fmt: skip


def measured(work: Callable[[], Any]) -> int:
    """Bytes that the server sent meanwhile."""
    before = HUB.sent()
    work()
    return HUB.sent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 100_000), ("k", 128), ("parameters", 1_000_000), ("sources", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--text", type=int, default=0, help="bytes of text kept of each row")
    parser.add_argument("--dtype", default="bfloat16")
    chosen = parser.parse_args()
    started, k = time.time(), chosen.k
    with tempfile.TemporaryDirectory() as scratch:
        made = synthetic(Path(scratch) / "bank", **vars(chosen))
        made.push_to_hub("me/bank")
        where = {"cache_dir": Path(scratch) / "cache"}
        bank, readout = ResponseBank.from_pretrained("me/bank", **where), torch.randn(1, 4, k)
        total = sum(file.size for file in made.manifest.files)
        steps: dict[str, Callable[[], Any]] = {
            "open and inspect, by ranges": lambda: ResponseBank.from_pretrained("me/bank", **where).inspect(),
            "sources of an output: their directions": lambda: bank.directions(lines=slice(k, None)),
            "its rows: their directions": lambda: bank.directions(lines=slice(k)),
            "its rows: coordinates": lambda: rank(readout, bank.coordinates(), 5),
        }
        if chosen.text:
            steps["one named row's text"] = lambda: bank.texts([chosen.rows // 2])
        steps["the next output"] = lambda: (bank.directions(), rank(readout, bank.coordinates(), 5))
        rows = []
        for name, step in steps.items():
            size = measured(step)
            rows.append({"what": name, "bytes": size, "share of the bank": size / total})
        title = f"bank of {chosen.rows:,} rows, k = {k}, {chosen.sources} sources, {chosen.dtype}: {total:,} bytes"
    report("bytes_per_query", title, rows, started, settings=vars(chosen), bank=total)


if __name__ == "__main__":
    main()
