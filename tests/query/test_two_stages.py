"""Rows named in two stages, against all directions and against reverse mode."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fwdattr.errors import QueryError, UnsupportedError
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.row_codes import BankResponses
from hf_fwdattr.query.scorer import Scorer
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import ROWS, TrainingDataAttributionPipeline, ask, base, config, fine_tune, queries


@pytest.fixture(scope="module", params=["responses", "exact", "directions alone"])
def tuned(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A fine-tuned model and a bank with maps that keeps its rows' responses, all directions, or few."""
    settings = {
        "responses": {"directions": 3},
        "exact": {},
        "directions alone": {"directions": 4, "responses_budget": 0},
    }
    model = adapted(base())
    callback = fine_tune(tmp_path_factory.mktemp("run"), model, config(**settings[request.param]))
    return request.param, model, callback.bank


def reader(model: Any, bank: Any) -> Scorer:
    return ask(model, bank)._reader


def responses(kind: str, bank: Any) -> torch.Tensor:
    """(rows, P) as the bank knows them."""
    if kind == "responses":
        return torch.cat([block.decode() for block in bank.row_codes()]).double()
    return (
        torch.cat([block.double() for _, _, block in bank.coordinates()])
        @ bank.directions()[: bank.manifest.directions].double()
    )


def test_what_is_kept(tuned: tuple[str, Any, Any]) -> None:
    kind, _, bank = tuned
    assert bank.manifest.row_codes == (ROWS if kind == "responses" else 0)
    assert all(name.endswith("c_proj") for name in bank.error_projections())
    assert 0 < bank.manifest.predictor_explained_variance <= 1


def test_with_passes_for_every_row_all_named_scores_are_exact(tuned: tuple[str, Any, Any]) -> None:
    kind, model, bank = tuned
    parameters = bank.check_model(model)
    for query in queries():
        gradient = -row_gradient(model.eval(), parameters, CAUSAL_LM, padded([query])).double()
        expected = responses(kind, bank) @ gradient
        (best, worst), estimate = reader(model, bank).rank(query, ROWS, 100)
        agree(estimate, expected, 1e-4)
        order = expected.argsort(descending=True)
        assert best.positions.tolist() == [int(i) for i in order if expected[i] > 0]
        assert worst.positions.tolist() == [int(i) for i in order.flip(0) if expected[i] < 0]
        agree(
            torch.cat([best.scores, worst.scores]).double(),
            expected[torch.cat([best.positions, worst.positions])],
            1e-4,
        )
        agree(best.token_scores.sum(1), best.scores, 1e-5)


def test_more_forward_passes_bring_the_estimate_nearer(tuned: tuple[str, Any, Any]) -> None:
    kind, model, bank = tuned
    parameters = bank.check_model(model)
    gradients = [-row_gradient(model.eval(), parameters, CAUSAL_LM, padded([query])) for query in queries()]
    truth = torch.stack(gradients).double() @ responses(kind, bank).T
    found = [reader(model, bank).scores(queries(), budget=budget).double() for budget in (1, 3, 99)]
    off = [float((scores - truth).norm() / truth.norm()) for scores in found]
    assert off[1] <= off[0] < 1
    assert off[2] < off[0]
    if kind != "responses":  # all of whose three directions were read, and no row
        assert off[2] < off[1]
        assert off[2] < 1e-4


def test_responses_that_are_too_many_to_hold_are_streamed(
    tuned: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, bank = tuned
    held = ask(model, bank).scores(queries(), budget=3)
    monkeypatch.setattr("hf_fwdattr.query.row_codes._UNPACKED", 0)
    monkeypatch.setattr("hf_fwdattr.bank.bank._BLOCK", 3 * bank.manifest.size)  # three rows at a time
    agree(ask(model, bank).scores(queries(), budget=3), held, 1e-5)


def test_a_first_look_is_the_predicted_gradient_times_the_responses(tuned: tuple[str, Any, Any]) -> None:
    kind, model, bank = tuned
    own = reader(model, bank)
    assert own._first_look is not None
    expected = own._first_look(padded(queries())).double() @ responses(kind, bank).T
    agree(ask(model, bank).scores(queries(), budget=1), expected, 1e-5)


def test_the_pipeline_names_the_same_rows_either_way(tuned: tuple[str, Any, Any]) -> None:
    kind, model, bank = tuned
    attribute = ask(model, bank)
    asked = {"prompt": "w1 w2", "completion": "w3 w4 w5"}
    whole, staged = attribute(asked, budget="all", top_k=3), attribute(asked, budget=60, top_k=3)
    assert [len(example["token_scores"]) for example in staged["examples"]] == [3] * len(staged["examples"])
    if kind != "responses":  # which knows more than the few directions do
        assert [example["row"] for example in staged["examples"]] == [example["row"] for example in whole["examples"]]
    assert [source["source"] for source in staged["sources"]] == [source["source"] for source in whole["sources"]]
    scores = [[source["score"] for source in result["sources"]] for result in (staged, whole)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    both = attribute([asked, {"prompt": "w9", "completion": "w4"}], budget=60, top_k=3, batch_size=2)
    assert [example["row"] for example in both[0]["examples"]] == [example["row"] for example in staged["examples"]]


def test_sources_without_probes_are_the_sums_of_their_rows(tmp_path: Path) -> None:
    model = adapted(base())
    bank: Any = fine_tune(tmp_path, model, config(source_directions=0)).bank
    query = queries()[0]
    (found,) = reader(model, bank).attribute([query], 3, 100)
    scores = ask(model, bank).scores([query])[0].double()
    sources = torch.cat([sources for _, sources, _ in bank.coordinates()])
    expected = torch.stack([scores[sources == index].sum() for index in range(len(bank.manifest.sources))])
    agree(found.sources, expected, 1e-4)


def test_budgets(tuned: tuple[str, Any, Any], tmp_path: Path) -> None:
    _, model, bank = tuned
    attribute: TrainingDataAttributionPipeline = ask(model, bank)
    with pytest.raises(QueryError, match="budget=0: a query takes at least one forward pass"):
        attribute.scores(queries(), budget=0)
    with pytest.raises(ValueError, match=r"budget='some': a number of forward passes, 'adaptive' .* or 'all'"):
        attribute("w1", budget="some")
    other = adapted(base())
    plain: Any = fine_tune(tmp_path, other, config(gradient_predictor=False)).bank
    assert not plain.manifest.error_projections
    assert plain.manifest.predictor_explained_variance is None
    with pytest.raises(QueryError, match="budget=5: the bank keeps nothing that a first look could use"):
        ask(other, plain).scores(queries(), budget=5)
    agree(ask(other, plain).scores(queries(), budget=ROWS + 1), ask(other, plain).scores(queries()), 1e-6)


def test_no_rows_no_responses(tmp_path: Path) -> None:
    """A bank that keeps sources only must not keep rows' responses by another door."""
    bank: Any = fine_tune(tmp_path, adapted(base()), config(directions=3, private_rows=True)).bank
    assert bank.manifest.row_codes == 0
    assert not bank.manifest.error_projections


def test_certainty(tuned: tuple[str, Any, Any]) -> None:
    kind, model, bank = tuned
    attribute = ask(model, bank)
    asked = {"prompt": "w1 w2", "completion": "w3 w4 w5"}
    if kind != "responses":
        with pytest.raises(QueryError, match="budget='adaptive': the bank does not keep what certainty takes"):
            attribute(asked, budget="adaptive")
        return
    named = [
        [(example["row"], example["score"]) for example in attribute(asked, budget=budget, top_k=2)["examples"]]
        for budget in ("adaptive", 100)
    ]
    assert named[0] == named[1]


def test_sums_are_the_kernels_leading_eigenvectors_times_the_responses(tmp_path: Path) -> None:
    bank: Any = fine_tune(tmp_path, adapted(base()), config(directions=3)).bank
    own = BankResponses(bank)
    assert own.kernel is not None
    values, vectors = torch.linalg.eigh(own.kernel.double())
    weights, directions = own.sums(4)
    agree((weights * vectors.flip(1)[:, :4]).sum(0).abs(), torch.ones(4).double(), 1e-4)
    assert bool((values.diff() >= 0).all())
    agree(directions, weights.T @ torch.cat([block.decode() for block in bank.row_codes()]).double(), 1e-5)
    more, further = own.sums(6)
    assert torch.equal(more[:, :4], weights)
    assert torch.equal(further[:4], directions)
    assert own.sums(1000)[0].shape == (ROWS, ROWS)


def test_a_quarter_of_the_passes_goes_along_sums_the_rest_to_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(base())
    bank: Any = fine_tune(tmp_path, model, config(directions=3)).bank
    own = reader(model, bank)
    opened, read = own.engine.opened, list[int]()

    def counted(batch: Any, staged: bool = False) -> Any:
        along = opened(batch, staged)

        def counting(directions: torch.Tensor) -> torch.Tensor:
            read.append(len(directions))
            return along(directions)

        return counting

    monkeypatch.setattr(own.engine, "opened", counted)
    for budget, sums, rows in ((13, 3, 9), (17, 4, ROWS), ("adaptive", ROWS, None)):
        read.clear()
        own.rank(queries()[0], 2, budget)
        assert read[0] == sums
        assert sum(read[1:]) == rows or (rows is None and sum(read[1:]) <= ROWS)


def test_adapters_that_are_switched_off_are_refused_by_the_first_look_too(tmp_path: Path) -> None:
    model = adapted(base())
    bank: Any = fine_tune(tmp_path, model, config(directions=3)).bank
    attribute = ask(model, bank)
    with model.disable_adapter(), pytest.raises(UnsupportedError, match="merged or switched off"):
        attribute({"prompt": "w1 w2", "completion": "w3"}, budget=9, top_k=2)
    layer = model.get_base_model().transformer.h[1].attn.c_attn
    layer.enable_adapters(False)  # one that rests moves nothing, and no more is said of it
    look = attribute._reader._gradients(queries()[:1])
    named = dict(zip(bank.check_model(model).live, bank.check_model(model).split(look), strict=True))
    resting = [value for name, value in named.items() if "h.1.attn.c_attn" in name]
    assert resting
    assert all(bool((value == 0).all()) for value in resting)
    assert bool((look != 0).any())
