"""Cost of a query as a ratio to a plain forward pass, measured in alternation."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


__all__ = ["Cost", "cost"]


@dataclass(frozen=True)
class Cost:
    """Cost of a query in plain forward passes.

    Attributes:
        ratio, low, high (`float`): median, lowest and highest ratio of the repeats.
        seconds (`float`): median time of one query.
    """

    ratio: float
    low: float
    high: float
    seconds: float


def cost(
    query: Callable[[], object],
    forward: Callable[[], object],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Time `query` against `forward` in alternation, so that a busy machine slows both; one call of each warms up.

    Args:
        query (`Callable`): all work for one query, until its scores are known.
        forward (`Callable`): one plain forward pass of the same query.

    Raises:
        ValueError: `repeats` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one")

    def seconds(call: Callable[[], object]) -> float:
        began = clock()
        call()
        return clock() - began

    query(), forward()
    pairs = [(seconds(query), seconds(forward)) for _ in range(repeats)]
    ratios = [spent / plain for spent, plain in pairs]
    return Cost(statistics.median(ratios), min(ratios), max(ratios), statistics.median(spent for spent, _ in pairs))
