"""Calls from many threads to one pipeline, against the same calls one after the other.

The pipeline is of a tiny GPT-2 whose bank is of means over the run, so that every call swaps the model's weights.
Calls are of eight kinds: given and generated outputs, chats, batches, rows by a budget, rows and sources of token
lists. A result counts as equal if every number in it is.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.thread_calls import call, from_threads, shared_pipeline

from ..report.results import report


def run(calls: int = 1000, threads: int = 8) -> int:
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        attribute = shared_pipeline(Path(folder))
        before = {name: value.clone() for name, value in attribute.model.state_dict().items()}
        expected, alone = timed(lambda: [call(attribute, number) for number in range(calls)])
        results, together = timed(lambda: from_threads(attribute, calls, threads))
        changed = sum(not torch.equal(value, before[n]) for n, value in attribute.model.state_dict().items())
    failed = sum(isinstance(result, Exception) for result in results)
    equal = sum(one == other for one, other in zip(results, expected, strict=True))
    line = {
        "calls": calls, "threads": threads, "equal": equal, "failed": failed, "weights changed": changed,
        "s one after the other": alone, "s from threads": together,
    }  # fmt: skip
    title = "Calls from threads to one pipeline, against the same calls one after the other"
    report("threads", title, [line], started, settings={"calls": calls, "threads": threads})
    return int(equal != calls or changed > 0)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and its seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started
