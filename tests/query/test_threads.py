"""One pipeline shared by threads: results of calls one after the other, and a model that is left as it was."""

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import hf_fwdattr
from hf_fwdattr import TrainingDataAttributionPipeline
from hf_fwdattr.jvp.backend import Backend
from tests.helpers.runs import ask, queries
from tests.helpers.thread_calls import KINDS, call, from_threads, shared_pipeline


PACKAGE = str(Path(hf_fwdattr.__file__).parent)
THREADS, CALLS = 8, 64  # `python -m benchmarks threads` makes 1,000


@pytest.fixture(scope="module")
def attribute(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataAttributionPipeline:
    return shared_pipeline(tmp_path_factory.mktemp("run"))


def state(attribute: TrainingDataAttributionPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in attribute.model.state_dict().items()}


def test_calls_from_threads_equal_the_same_calls_one_after_the_other(
    attribute: TrainingDataAttributionPipeline,
) -> None:
    before = state(attribute)
    expected = [call(attribute, number) for number in range(len(KINDS))]
    results = from_threads(attribute, CALLS, THREADS)
    assert [number for number, result in enumerate(results) if result != expected[number % len(KINDS)]] == []
    assert all(torch.equal(value, before[name]) for name, value in attribute.model.state_dict().items())


def test_two_pipelines_of_one_model_may_be_asked_at_once(attribute: TrainingDataAttributionPipeline) -> None:
    other = ask(attribute.model, attribute.bank, readout="jvp")
    kinds = [KINDS[0], KINDS[5]]
    expected = [[kind(one) for kind in kinds] for one in (attribute, other)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i % 2, i // 2 % 2, pool.submit(kinds[i // 2 % 2], (attribute, other)[i % 2])) for i in range(24)]
    assert all(job.result() == expected[one][kind] for one, kind, job in jobs)


class Interrupt:
    """Press Ctrl-C when a function of the package is called for the n-th time; without a number, only count.

    What tidies up is left alone: Python may break off that too, and nobody could tidy up after it.
    """

    def __init__(self, name: str = "", number: int = 0):
        self._name, self._number, self.counts = name, number, Counter[str]()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        tidying = code.co_name in ("__exit__", "<genexpr>", "uninterrupted")
        if event != "call" or not code.co_filename.startswith(PACKAGE) or tidying:
            return
        name = f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_qualname}"
        self.counts[name] += 1
        if name == self._name and self.counts[name] == self._number:
            sys.settrace(None)
            raise KeyboardInterrupt

    def during(self, work: Callable[[], Any]) -> None:
        previous = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(previous)


def everything(attribute: TrainingDataAttributionPipeline) -> dict[str, Any]:
    """Return all of a model and of torch that a query changes for a while, but for the weights."""
    model: Any = attribute.model
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": (model.config.use_cache, model.config._attn_implementation),
        "torch": (torch.is_grad_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.get_default_dtype()),
    }


@pytest.mark.parametrize("kind", [1, 3], ids=["two stages", "generated"])
def test_call_interrupted_anywhere_leaves_the_model_as_it_was(
    attribute: TrainingDataAttributionPipeline, kind: int
) -> None:
    """Ctrl-C in some of the functions that a call goes through, in the middle of its calls."""
    before, expected, known = state(attribute), KINDS[kind](attribute), everything(attribute)
    counting = Interrupt()
    counting.during(lambda: KINDS[kind](attribute))
    chosen = [*list(counting.counts)[::24], *(name for name in counting.counts if name.endswith("._layer_hook"))]
    assert len(chosen) > 4
    for name in chosen:
        with pytest.raises(KeyboardInterrupt):
            Interrupt(name, (counting.counts[name] + 1) // 2).during(lambda: KINDS[kind](attribute))
        assert everything(attribute) == known, name
        assert all(torch.equal(value, before[key]) for key, value in attribute.model.state_dict().items()), name
    assert KINDS[kind](attribute) == expected  # nor does the lock stay closed


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError])
def test_error_within_a_scorer_leaves_the_model_as_it_was(
    attribute: TrainingDataAttributionPipeline, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before, expected, known = state(attribute), KINDS[0](attribute), everything(attribute)

    def interrupted(*_: Any, **__: Any) -> Any:
        changed = attribute.model.state_dict()
        assert any(not torch.equal(changed[name], value) for name, value in before.items())  # the mean weights
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Backend, "prepare", interrupted)
        with pytest.raises(error):
            KINDS[0](attribute)
    assert all(torch.equal(value, before[name]) for name, value in attribute.model.state_dict().items())
    assert everything(attribute) == known
    assert KINDS[0](attribute) == expected  # nor does the lock stay closed


def test_failed_read_of_directions_changes_no_later_score(
    attribute: TrainingDataAttributionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = ask(attribute.model, attribute.bank)
    expected = fresh.scorer.directional_derivatives(queries(1), slice(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(type(fresh.bank), "directions", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fresh.scorer.directional_derivatives(queries(1))
    assert torch.equal(fresh.scorer.directional_derivatives(queries(1), slice(1, 2)), expected)
