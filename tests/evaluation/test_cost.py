import pytest

from hf_fwdattr.evaluation.cost import cost


class Machine:
    """A clock that moves when something is done, and slows down."""

    def __init__(self) -> None:
        self.now, self.pace, self.log = 0.0, 1.0, ""

    def does(self, seconds: float, name: str):  # type: ignore[no-untyped-def]
        def call() -> None:
            self.now += seconds * self.pace
            self.log += name

        return call


def test_ratios_of_neighbours() -> None:
    """A machine that gets slower all the time: each query is compared with the forward next to it."""
    machine = Machine()
    query, plain = machine.does(6.0, "q"), machine.does(2.0, "f")

    def slower() -> None:
        query()
        machine.pace *= 1.1

    result = cost(slower, plain, repeats=3, clock=lambda: machine.now)
    assert machine.log == "qf" * 4  # one to warm up, then in turn
    assert result.ratio == pytest.approx(3 / 1.1)
    assert result.low == pytest.approx(result.high)
    assert result.seconds == pytest.approx(6 * 1.1**2)


def test_no_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        cost(lambda: None, lambda: None, repeats=0)
