"""Bytes downloaded for one query of a bank on the Hub, against the bank's size.

A bank of random numbers is pushed to the server of the tests and read back from an empty cache with the real client.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.hub_server import HUB, TOKEN


os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.query.ranking import rank

from ..report.results import report
from ..synthetic import synthetic_bank


def run(
    rows: int = 100_000, k: int = 128, parameters: int = 1_000_000, sources: int = 32, text: int = 0,
    dtype: str = "bfloat16",
) -> None:  # fmt: skip
    settings, started = dict(locals()), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        made = synthetic_bank(Path(scratch) / "bank", **settings)
        made.push_to_hub("me/bank")
        where = {"cache_dir": Path(scratch) / "cache"}
        bank, derivatives = ResponseBank.from_pretrained("me/bank", **where), torch.randn(1, 4, k)
        total = sum(file.size for file in made.manifest.files)
        steps: dict[str, Callable[[], Any]] = {
            "open and inspect, by ranges": lambda: ResponseBank.from_pretrained("me/bank", **where).inspect(),
            "sources of an output: their directions": lambda: bank.directions(lines=slice(k, None)),
            "its rows: their directions": lambda: bank.directions(lines=slice(k)),
            "its rows: coordinates": lambda: rank(derivatives, bank.coordinates(), 5),
        }
        if text:
            steps["one named row's text"] = lambda: bank.texts([rows // 2])
        steps["the next output"] = lambda: (bank.directions(), rank(derivatives, bank.coordinates(), 5))
        lines = []
        for name, step in steps.items():
            before = HUB.sent()
            step()
            size = HUB.sent() - before
            lines.append({"what": name, "bytes": size, "share of the bank": size / total})
    title = f"bank of {rows:,} rows, k = {k}, {sources} sources, {dtype}: {total:,} bytes"
    report("bytes_per_query", title, lines, started, settings=settings, bank=total)
