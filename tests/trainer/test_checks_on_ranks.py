"""Values that one of two processes sees amiss are refused on both at the first step, and none waits for the other."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_fwdattr.errors import AttributionError
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.response.distributed import Ranks
from hf_fwdattr.trainer.guard import Guard
from hf_fwdattr.trainer.optimizer import Preconditioner
from hf_fwdattr.trainer.step_checks import LoopChecks, StepCheck
from hf_fwdattr.trainer.value_checks import LossCheck


class Threads(Ranks):
    """Two threads in place of processes: what is gathered goes through a barrier."""

    barrier, gathered = threading.Barrier(2, timeout=20), [None, None]

    def __init__(self, rank: int):
        self.rank, self.size = rank, 2

    def objects(self, item: Any) -> list[Any]:
        self.gathered[self.rank] = item
        self.barrier.wait()
        result = list(self.gathered)
        self.barrier.wait()
        return result


class Loop:
    """A training loop on one rank, with the hooks that the recorder sets."""

    def __init__(self, rank: int):
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3, bias=False)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        preconditioner = Preconditioner.of(self.optimizer, self.layer, TrackedParameters.of(self.layer, "trainable"))
        step, self.guard = StepCheck(self.optimizer, preconditioner, dict(self.layer.named_parameters())), Guard()
        self.notes: list[str] = []
        loss = LossCheck(self.layer, CAUSAL_LM)
        self.checks = LoopChecks(loss, step, self.guard, self.notes.append, Threads(rank))
        self.taken = 0

    def step(self, disturb: Callable[["Loop", str], None]) -> None:
        self.optimizer.zero_grad()
        self.layer(torch.ones(3)).square().sum().backward()
        self.checks.step.after_backward()
        disturb(self, "backward")
        self.checks.before_step(1.0, 1.0)
        self.optimizer.step()
        self.taken += 1
        disturb(self, "step")
        self.checks.after_step()
        self.guard.training = True


def reporting(loop: Loop, place: str) -> None:
    """A mismatch of losses, which is found in the middle of a forward or a backward pass."""
    if place == "backward":
        loop.checks.report("the model's loss is another")


def scaling(loop: Loop, place: str) -> None:
    if place == "backward" and loop.layer.weight.grad is not None:
        loop.layer.weight.grad *= 3


def moving(loop: Loop, place: str) -> None:
    if place == "step":
        with torch.no_grad():
            loop.layer.weight += 1.0


def quiet(loop: Loop, place: str) -> None:
    pass


def on_two_ranks(steps: int, disturb: Callable[[Loop, str], None], first: int = 0) -> list[tuple[Loop, Any]]:
    """Take steps on both ranks; the second is disturbed from its `first` step on. What each ends with."""
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        loop = Loop(rank)
        error: Any = None
        try:
            for step in range(steps):
                loop.step(disturb if rank == 1 and step >= first else quiet)
        except AttributionError as caught:
            error = caught
        results[rank] = loop, error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("disturb", "message", "taken"),
    [
        (reporting, "the model's loss is another", 0),
        (scaling, "the gradient of weight: 3 of what backward()", 0),
        (moving, "the step of weight: the weights moved by", 1),
    ],
)
def test_mismatch_on_one_rank_is_refused_on_both(disturb: Any, message: str, taken: int) -> None:
    (first, other), (second, own) = on_two_ranks(2, disturb)
    assert str(own).startswith(message)
    assert str(other).startswith(f"rank 1: {message}")
    assert (first.taken, second.taken) == (taken, taken)


def test_honest_steps_are_taken_on_both() -> None:
    for loop, error in on_two_ranks(3, quiet):
        assert error is None
        assert (loop.taken, loop.notes) == (3, [])


def test_ranks_meet_at_the_first_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later steps wait for nobody."""
    counts, objects = list[int](), Threads.objects

    def counted(threads: Threads, item: Any) -> list[Any]:
        counts[-1] += 1
        return objects(threads, item)

    monkeypatch.setattr(Threads, "objects", counted)
    for steps in (1, 3):
        counts.append(0)
        on_two_ranks(steps, quiet)
    assert counts[0] == counts[1] > 0


def test_later_mismatch_is_noted_where_it_is_seen() -> None:
    (first, _), (second, error) = on_two_ranks(11, reporting, first=10)
    assert error is None
    assert first.notes == []
    assert second.notes == ["step 11: the model's loss is another"]
