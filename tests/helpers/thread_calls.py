"""Calls of every kind to one pipeline, from many threads and one after the other."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_fwdattr import TrainingDataAttributionPipeline
from tests.helpers.cases import adapted
from tests.helpers.runs import ask, base, config, fine_tune, queries, training_set


Call = Callable[[TrainingDataAttributionPipeline], Any]
DATA = training_set()
GIVEN = {"prompt": "w1 w2", "completion": " w3 w4 w5"}
CHAT = [{"role": "user", "content": "w2 w3"}]
KINDS: list[Call] = [
    lambda attribute: attribute(GIVEN, top_k=2, budget="all"),
    lambda attribute: attribute(GIVEN, top_k=2, budget=9, dataset=DATA),
    lambda attribute: attribute({"prompt": CHAT, "completion": " w7"}, top_k=0),
    lambda attribute: attribute("w4 w5", top_k=2, budget="all", max_new_tokens=2, do_sample=False),
    lambda attribute: attribute([GIVEN, DATA[3]], batch_size=2, top_k=0),
    lambda attribute: attribute.scores(queries(1)).tolist(),
    lambda attribute: attribute.scores(queries(1), budget=5).tolist(),
    lambda attribute: attribute.source_scores(queries(1)).tolist(),
]


def shared_pipeline(folder: Path) -> TrainingDataAttributionPipeline:
    """Fine-tune, and return a pipeline whose model gets the mean weights of training while it is asked."""
    model = adapted(base())
    settings = config(directions=3, parameters="lora", averaging="trajectory")
    bank = fine_tune(folder, model, settings).bank
    assert bank is not None
    assert bank.manifest.averaging == "trajectory"
    assert bank.manifest.error_variances
    return ask(model, bank)


def call(attribute: TrainingDataAttributionPipeline, number: int) -> Any:
    """Make the call of a number; its kind follows from the number."""
    return KINDS[(3 * number) % len(KINDS)](attribute)


def from_threads(attribute: TrainingDataAttributionPipeline, calls: int, threads: int) -> list[Any]:
    """Return the results of calls 0, 1, ..., made by so many threads at once; an error is its own result."""

    def made(number: int) -> Any:
        try:
            return call(attribute, number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(made, range(calls)))
