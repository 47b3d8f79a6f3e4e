"""One pipeline shared by threads: results of calls one after the other, and a model that is left as it was."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from hf_fwdattr import TrainingDataAttributionPipeline
from hf_fwdattr.jvp.backend import Backend
from tests.helpers.cases import adapted
from tests.helpers.runs import ask, base, config, fine_tune, queries, training_set


THREADS, CALLS = 8, 200
DATA = training_set()
GIVEN = {"prompt": "w1 w2", "completion": " w3 w4 w5"}
CHAT = [{"role": "user", "content": "w2 w3"}]
Call = Callable[[TrainingDataAttributionPipeline], Any]
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


@pytest.fixture(scope="module")
def attribute(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataAttributionPipeline:
    """A pipeline whose model gets the mean weights of training while it is asked."""
    model = adapted(base())
    settings = config(directions=3, parameters="lora", averaging="trajectory")
    bank = fine_tune(tmp_path_factory.mktemp("run"), model, settings).bank
    assert bank is not None
    assert bank.manifest.averaging == "trajectory"
    assert bank.manifest.error_covariance
    return ask(model, bank)


def state(attribute: TrainingDataAttributionPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in attribute.model.state_dict().items()}


def test_calls_from_threads_equal_the_same_calls_one_after_the_other(
    attribute: TrainingDataAttributionPipeline,
) -> None:
    before = state(attribute)
    expected = [call(attribute) for call in KINDS]
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(KINDS[(3 * index) % len(KINDS)], attribute) for index in range(CALLS)]
        wrong = [index for index, job in enumerate(jobs) if job.result() != expected[(3 * index) % len(KINDS)]]
    assert wrong == []
    assert all(torch.equal(value, before[name]) for name, value in attribute.model.state_dict().items())


def test_two_pipelines_of_one_model_may_be_asked_at_once(attribute: TrainingDataAttributionPipeline) -> None:
    other = ask(attribute.model, attribute.bank, readout="jvp")
    kinds = [KINDS[0], KINDS[5]]
    expected = [[call(one) for call in kinds] for one in (attribute, other)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i % 2, i // 2 % 2, pool.submit(kinds[i // 2 % 2], (attribute, other)[i % 2])) for i in range(24)]
    assert all(job.result() == expected[one][kind] for one, kind, job in jobs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_call_leaves_the_model_as_it_was(
    attribute: TrainingDataAttributionPipeline, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before, expected = state(attribute), KINDS[0](attribute)

    def interrupted(*_: Any, **__: Any) -> Any:
        changed = attribute.model.state_dict()
        assert any(not torch.equal(changed[name], value) for name, value in before.items())  # the mean weights
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Backend, "prepare", interrupted)
        with pytest.raises(error):
            KINDS[0](attribute)
    assert all(torch.equal(value, before[name]) for name, value in attribute.model.state_dict().items())
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
