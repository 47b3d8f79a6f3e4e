"""`readout="backward"`: the same scores from one backward pass, and no backward pass anywhere else."""

from typing import Any

import pytest
import torch

from hf_fwdattr import ResponseBank
from hf_fwdattr.query.scorer import Scorer
from tests.helpers.cases import adapted
from tests.helpers.reference import agree
from tests.helpers.runs import ROWS, ask, base, config, fine_tune, queries


@pytest.fixture(scope="module", params=["row codes", "directions alone", "exact", "sources alone"])
def tuned(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ResponseBank]:
    settings: dict[str, Any] = {
        "row codes": {"directions": 3}, "directions alone": {"directions": 4, "responses_budget": 0}, "exact": {},
        "sources alone": {"directions": 3, "source_directions": 0},
    }[request.param]  # fmt: skip
    model = adapted(base())
    bank = fine_tune(tmp_path_factory.mktemp("run"), model, config(**settings)).bank
    assert bank is not None
    return model.eval(), bank


def test_backward_scores_are_those_of_forward_passes(tuned: tuple[Any, ResponseBank]) -> None:
    model, bank = tuned
    forward, backward = Scorer(bank, model), Scorer(bank, model, readout="backward")
    for query in queries():
        expected = torch.stack([forward.row_scores(query, [row])[0] for row in range(ROWS)])
        agree(backward.scores([query])[0].double(), expected, 1e-4)
        ranking = backward.rank(query, 2)
        for side, sign in ((ranking.proponents, 1.0), (ranking.opponents, -1.0)):
            best = [int(row) for row in (sign * expected).argsort(descending=True)[:2] if sign * expected[row] > 0]
            assert side.row_indices.tolist() == best
            agree(side.token_scores.sum(1), side.scores, 1e-4)
        assert ranking.passes == 1 + len(ranking.proponents.ids) + len(ranking.opponents.ids) <= 5
        if bank.manifest.source_directions:
            agree(backward.source_scores([query]), forward.source_scores([query]), 1e-4)


def test_pipeline_takes_the_backward_readout(tuned: tuple[Any, ResponseBank]) -> None:
    model, bank = tuned
    asked = {"prompt": "w1 w2", "completion": " w3 w4"}
    (best,) = ask(model, bank, readout="backward")(asked, top_k=1)["examples"][:1]
    assert (
        best["row"]
        == ask(model, bank)(asked, top_k=1, budget=100 if bank.manifest.row_codes else "all")["examples"][0]["row"]
    )


def test_nothing_else_goes_backward(tuned: tuple[Any, ResponseBank], monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = tuned
    calls: list[str] = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append("grad"))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: calls.append("backward"))
    scorer = Scorer(bank, model)
    scorer.attribute(queries(), 2)
    scorer.rank(queries()[0], 2)
    assert not calls
