"""Time that the callback takes before the first step and in the training loop, by the processor's clock on one thread.

Runs with and without it take turns in one process. Its share of a step is the time inside its own functions over that
of the step, which a busy machine disturbs less than the ratio of steps with and without it; that is told, too.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from transformers import TrainerCallback

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.trainer import build
from hf_fwdattr.trainer.clipping import ClippingRecorder
from hf_fwdattr.trainer.recorder import ResponseRecorder
from hf_fwdattr.trainer.row_weights import BatchRecorder
from hf_fwdattr.trainer.step_checks import LoopChecks
from hf_fwdattr.trainer.value_checks import LossCheck, is_checked

from .world import World


__all__ = ["loop_shares"]

RUNS = (100, 1000)  # steps of the runs whose shares are told
# The functions that the loop enters: hooks of model, weights, optimizer and accelerator, and the recording of a step.
_ENTERED: tuple[tuple[type, str], ...] = (
    (BatchRecorder, "_before_forward"), (BatchRecorder, "_after_forward"), (ResponseRecorder, "_before_step"),
    (ResponseRecorder, "_after_step"), (ResponseRecorder, "step"), (ClippingRecorder, "_record"),
    (LoopChecks, "_arrived"), (LossCheck, "backward"),
)  # fmt: skip


class Meter:
    """Sums the processor's seconds that pass inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return function(*given, **more)
            finally:
                self.seconds += time.process_time() - began

        return timed

    @contextmanager
    def on(self, *functions: tuple[Any, str]) -> Iterator["Meter"]:
        """Time these functions, which must not call each other."""
        with ExitStack() as stack:
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, self.around(getattr(owner, name))))
            yield self


class StepClock(TrainerCallback):
    """Keeps the seconds from the end of each step to that of the next, and a meter's among them."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.steps, self.inside = meter, list[float](), list[float]()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._last, self.meter.seconds = time.process_time(), 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.process_time()
        self.steps.append(now - self._last)
        self.inside.append(self.meter.seconds)
        self._last, self.meter.seconds = now, 0.0


class LoopOnly(ResponseCallback):
    """The callback without its passes."""

    def on_train_end(self, *_: Any, **__: Any) -> None:
        assert not self.recorder.record.notes, self.recorder.record.notes
        self.recorder.detach()


def loop_shares(world: World, steps: int, pairs: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the seconds before the first step and the callback's share of the loop, from paired runs.

    Args:
        world (`World`): whose model is trained.
        steps (`int`): of each run; more than 10, so that two steps are checked.
        pairs (`int`): runs with the callback and without it.
        settings (`dict`): of the bank.
    """
    config = ResponseConfig(quiet=True, **(world.bank | settings))
    _run(world, 2, [])  # warm up
    plain, watched, before, trial = [], [], [], []
    for _ in range(pairs):
        plain.append(_run(world, steps, []))
        with (
            Meter().on((ResponseCallback, "on_train_begin")) as first,
            Meter().on((build, "refuse_failing_batch")) as rows,
        ):
            watched.append(_run(world, steps, [LoopOnly(config)]))
        before.append(first.seconds)
        trial.append(rows.seconds)
    checked = [step for step in range(steps) if is_checked(step)]
    ordinary = [step for step in range(1, steps) if step not in checked]
    without, with_it = (
        statistics.median(run.steps[step] for run in runs for step in ordinary) for runs in (plain, watched)
    )
    inside = statistics.median(run.inside[step] for run in watched for step in ordinary)
    extra = [statistics.median(run.inside[step] for run in watched) - inside for step in checked]
    return [
        _line("before the first step, in steps", statistics.median(before) / without, statistics.median(before)),
        _line("of that, the trial batch", statistics.median(trial) / without, statistics.median(trial)),
        _line("an ordinary step with the callback, against without", with_it / without, with_it),
        _line("inside the callback in an ordinary step, share", inside / without, inside),
        *(
            _line(f"more inside it at step {step + 1}, in steps", seconds / without, seconds)
            for step, seconds in zip(checked, extra, strict=True)
        ),
        *(_share(total, inside, extra, without) for total in RUNS),
    ]


def _share(steps: int, inside: float, extra: list[float], without: float) -> dict[str, Any]:
    """Return the line of a run's share; a check that was not measured takes as long as the last one that was."""
    checks = sum(map(is_checked, range(steps)))
    rare = sum(extra[:checks]) + extra[-1] * max(0, checks - len(extra))
    seconds = steps * inside + rare
    return _line(f"inside the callback in {steps} steps, share", seconds / (steps * without), seconds)


def _run(world: World, steps: int, callbacks: list[TrainerCallback]) -> StepClock:
    with tempfile.TemporaryDirectory() as folder, Meter().on(*_ENTERED) as meter:
        clock = StepClock(meter)
        world.trainer(folder, [clock, *callbacks], max_steps=steps).train()
    return clock


def _line(label: str, ratio: float, seconds: float) -> dict[str, Any]:
    return {"what": label, "ratio": ratio, "seconds": seconds}
