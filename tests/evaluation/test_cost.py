"""Cost of a query on a clock of the test."""

import pytest

from hf_fwdattr.evaluation.cost import cost


class Machine:
    """A clock that each call moves on, at a pace."""

    def __init__(self) -> None:
        self.now, self.pace, self.log = 0.0, 1.0, ""

    def call(self, seconds: float, name: str):  # type: ignore[no-untyped-def]
        def advance() -> None:
            self.now += seconds * self.pace
            self.log += name

        return advance


def test_cost_compares_neighbouring_calls() -> None:
    """On a machine that gets slower and slower, each query is compared with the forward pass next to it."""
    machine = Machine()
    query, plain = machine.call(6.0, "q"), machine.call(2.0, "f")

    def slower() -> None:
        query()
        machine.pace *= 1.1

    result = cost(slower, plain, repeats=3, clock=lambda: machine.now)
    assert machine.log == "qf" * 4  # one to warm up, then in turn
    assert result.ratio == pytest.approx(3 / 1.1)
    assert result.low == pytest.approx(result.high)
    assert result.seconds == pytest.approx(6 * 1.1**2)


def test_cost_needs_one_repeat() -> None:
    with pytest.raises(ValueError, match="at least one"):
        cost(lambda: None, lambda: None, repeats=0)


def test_cost_is_the_median_ratio() -> None:
    """Queries of 2, 9 and 4 seconds beside forwards of one: the median, the lowest and the highest."""
    ticks = iter([0.0, 2, 2, 3, 3, 12, 12, 13, 13, 17, 17, 18])
    result = cost(lambda: None, lambda: None, repeats=3, clock=lambda: next(ticks))
    assert (result.ratio, result.low, result.high, result.seconds) == (4.0, 2.0, 9.0, 4.0)
