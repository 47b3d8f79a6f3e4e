"""What a query costs, as a ratio to a plain forward pass measured in turn with it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Result of [`cost`].

    Attributes:
        ratio, low, high (`float`): median, lowest and highest ratio of the repeats.
        seconds (`float`): median time of one call.
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
    """Time `query` against `forward`, alternating, so that a busy machine slows both; one call of each warms up.

    Args:
        query (`Callable`): everything that is done for the query, until its scores are there.
        forward (`Callable`): one plain forward pass of the same query.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one")

    def seconds(what: Callable[[], object]) -> float:
        began = clock()
        what()
        return clock() - began

    query(), forward()
    pairs = [(seconds(query), seconds(forward)) for _ in range(repeats)]
    ratios = [spent / plain for spent, plain in pairs]
    return Cost(statistics.median(ratios), min(ratios), max(ratios), statistics.median(spent for spent, _ in pairs))
