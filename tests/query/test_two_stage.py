"""Two-stage scores against all directions and against reverse mode."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fwdattr import ResponseBank
from hf_fwdattr.errors import MismatchError, NumericalError, QueryError, UnsupportedError
from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.jvp.backend import Backend, PreparedBatch
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.row_codes import HeldRowCodes
from hf_fwdattr.query.scorer import Scorer
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import ROWS, ask, base, config, fine_tune, queries


ASKED = {"prompt": "w1 w2", "completion": " w3 w4 w5"}
Tuned = tuple[str, Any, ResponseBank]


def tune(folder: Path, **settings: Any) -> tuple[Any, ResponseBank]:
    """Return a fine-tuned model in evaluation mode, and its bank."""
    model = adapted(base())
    bank = fine_tune(folder, model, config(**settings)).bank
    assert bank is not None
    return model.eval(), bank


@pytest.fixture(scope="module", params=["row codes", "exact", "directions alone"])
def tuned(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A fine-tuned model, and a bank with error projections that holds row codes, all directions, or few."""
    settings = {
        "row codes": {"directions": 3},
        "exact": {},
        "directions alone": {"directions": 4, "responses_budget": 0},
    }
    return request.param, *tune(tmp_path_factory.mktemp("run"), **settings[request.param])


def responses(bank: ResponseBank) -> torch.Tensor:
    """Return the row responses (rows, P) that a bank holds."""
    if bank.manifest.row_codes:
        return torch.cat([block.decode() for block in bank.row_codes()]).double()
    directions = bank.directions()[: bank.manifest.directions].double()
    return torch.cat([block.double() for _, _, block in bank.coordinates()]) @ directions


def gradients(model: Any, bank: ResponseBank) -> torch.Tensor:
    """Return the queries' exact gradients (queries, P), by reverse mode."""
    parameters = bank.check_model(model)
    return -torch.stack([row_gradient(model, parameters, CAUSAL_LM, padded([query])) for query in queries()]).double()


def test_bank_holds_projections_and_row_codes(tuned: Tuned) -> None:
    kind, _, bank = tuned
    assert bank.manifest.row_codes == (ROWS if kind == "row codes" else 0)
    assert all(name.endswith("c_proj") for name in bank.error_projections())
    assert bank.manifest.predictor_explained_variance is not None
    assert 0 < bank.manifest.predictor_explained_variance <= 1


def test_scores_are_exact_when_every_row_is_read(tuned: Tuned) -> None:
    _, model, bank = tuned
    scorer = Scorer(bank, model)
    for query, gradient in zip(queries(), gradients(model, bank), strict=True):
        expected = responses(bank) @ gradient
        ranking = scorer.rank(query, ROWS, 100)
        best, worst = ranking.proponents, ranking.opponents
        agree(ranking.scores, expected, 1e-4)
        order = expected.argsort(descending=True)
        assert best.row_indices.tolist() == [int(i) for i in order if expected[i] > 0]
        assert worst.row_indices.tolist() == [int(i) for i in order.flip(0) if expected[i] < 0]
        named = torch.cat([best.row_indices, worst.row_indices])
        agree(torch.cat([best.scores, worst.scores]).double(), expected[named], 1e-4)
        agree(best.token_scores.sum(1), best.scores, 1e-5)
        chosen = [5, 0, 5, 9]
        agree(scorer.row_scores(query, chosen), expected[chosen], 1e-4)


def test_more_passes_reduce_the_error(tuned: Tuned) -> None:
    kind, model, bank = tuned
    truth = gradients(model, bank) @ responses(bank).T
    estimates = [Scorer(bank, model).scores(queries(), budget=budget).double() for budget in (1, 3, 99)]
    errors = [float((scores - truth).norm() / truth.norm()) for scores in estimates]
    assert errors[1] <= errors[0] < 1
    assert errors[2] < errors[0]
    if kind != "row codes":  # all directions are read, and no row
        assert errors[2] < errors[1]
        assert errors[2] < 1e-4


def test_streamed_row_codes_give_the_same_scores(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, bank = tuned
    held = Scorer(bank, model).scores(queries(), budget=3)
    monkeypatch.setattr("hf_fwdattr.query.row_codes._HELD", 0)
    monkeypatch.setattr("hf_fwdattr.bank.bank._BLOCK", 3 * bank.manifest.size)  # three rows at a time
    agree(Scorer(bank, model).scores(queries(), budget=3), held, 1e-5)


def test_coarse_scores_are_predicted_gradients_times_responses(tuned: Tuned) -> None:
    _, model, bank = tuned
    predictor = GradientPredictor(model, bank.check_model(model), CAUSAL_LM, bank.error_projections())
    predicted = predictor(padded(queries()))
    assert torch.equal(Scorer(bank, model).predicted_gradients(queries()), predicted)
    agree(Scorer(bank, model).scores(queries(), budget=1), predicted.double() @ responses(bank).T, 1e-5)


def test_pipeline_names_the_same_rows_in_two_stages_as_by_directions(tuned: Tuned) -> None:
    kind, model, bank = tuned
    attribute = ask(model, bank)
    whole, staged = attribute(ASKED, budget="all", top_k=3), attribute(ASKED, budget=60, top_k=3)
    assert [len(example["token_scores"]) for example in staged["examples"]] == [3] * len(staged["examples"])
    if kind != "row codes":  # which say more than few directions
        assert [example["row"] for example in staged["examples"]] == [example["row"] for example in whole["examples"]]
    assert [source["source"] for source in staged["sources"]] == [source["source"] for source in whole["sources"]]
    scores = [[source["score"] for source in result["sources"]] for result in (staged, whole)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    both = attribute([ASKED, {"prompt": "w9", "completion": " w4"}], budget=60, top_k=3, batch_size=2)
    assert [example["row"] for example in both[0]["examples"]] == [example["row"] for example in staged["examples"]]


def test_sources_without_directions_are_the_sums_of_their_rows(tmp_path: Path) -> None:
    model, bank = tune(tmp_path, source_directions=0)
    scorer = Scorer(bank, model)
    (attribution,) = scorer.attribute(queries(1), 3, 100)
    scores = scorer.scores(queries(1))[0].double()
    sources = torch.cat([sources for _, sources, _ in bank.coordinates()])
    expected = torch.stack([scores[sources == index].sum() for index in range(len(bank.manifest.sources))])
    agree(attribution.sources, expected, 1e-4)


@pytest.mark.parametrize("budget", ["some", True, 2.5])
def test_value_that_is_no_budget_is_refused(tuned: Tuned, budget: Any) -> None:
    _, model, bank = tuned
    for call in (
        lambda: ask(model, bank)(ASKED, budget=budget),
        lambda: Scorer(bank, model).scores(queries(), 1, budget),
    ):
        with pytest.raises(ValueError, match=f"budget={budget!r}: neither a number of .*'adaptive' .* nor 'all'"):
            call()


def test_budget_that_the_bank_cannot_serve_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    kind, model, bank = tuned
    scorer = Scorer(bank, model)
    with pytest.raises(QueryError, match="budget=0: a query takes at least one forward pass"):
        scorer.scores(queries(), budget=0)
    if kind == "row codes":
        with pytest.raises(QueryError, match="budget='adaptive': it chooses rows to name, and here all are scored"):
            scorer.scores(queries(), budget="adaptive")
        return
    with pytest.raises(QueryError, match="budget='adaptive': the bank does not hold row codes, so"):
        ask(model, bank)(ASKED, budget="adaptive")


def test_exact_bank_without_predictor_reads_all_directions(tmp_path: Path) -> None:
    model, bank = tune(tmp_path, gradient_predictor=False)
    scorer = Scorer(bank, model)
    assert not bank.manifest.error_projections
    assert bank.manifest.predictor_explained_variance is None
    assert scorer.resolve_budget(None) == scorer.resolve_budget(ROWS + 1) == "all"
    with pytest.raises(QueryError, match="budget=5: the bank holds neither row codes nor a gradient predictor"):
        scorer.scores(queries(), budget=5)
    with pytest.raises(QueryError, match="the bank holds no gradient predictor; build it with"):
        scorer.predicted_gradients(queries())
    agree(scorer.scores(queries(), budget=ROWS + 1), scorer.scores(queries()), 1e-6)
    ranking = scorer.rank(queries()[0], ROWS)
    assert ranking.passes == ROWS + 1
    agree(ranking.scores, scorer.scores(queries(1))[0].double(), 1e-6)
    agree(scorer.row_scores(queries()[0], range(ROWS)), ranking.scores, 1e-6)


def test_bank_without_predictor_is_read_in_two_stages(tmp_path: Path) -> None:
    """Row codes suffice: nothing is predicted, and directions that were read tell of the rows."""
    model, bank = tune(tmp_path, gradient_predictor=False, directions=4)
    scorer, truth = Scorer(bank, model), gradients(model, bank) @ responses(bank).T
    errors = [float((scorer.scores(queries(), budget=budget).double() - truth).norm()) for budget in (1, 3, 5)]
    assert errors[0] == pytest.approx(float(truth.norm()))
    assert errors[2] < errors[1] < errors[0]
    ranking = scorer.rank(queries()[0], 2, 9)
    expected = truth[0]
    for side in (ranking.proponents, ranking.opponents):
        assert bool(side.exact.all())
        agree(side.scores.double(), expected[side.row_indices], 1e-3)
    assert ranking.passes == 9
    agree(scorer.rank(queries()[0], 2, 100).scores, expected, 1e-3)


def test_coordinates_that_are_not_finite_give_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not looked at when a bank is opened; see `tests/bank/test_damage.py`."""
    model, bank = tune(tmp_path, directions=3)
    stored = [(torch.full_like(part, float("nan")), scales) for part, scales in bank.stored_coordinates()]
    monkeypatch.setattr(ResponseBank, "stored_coordinates", lambda bank: iter(stored))
    with pytest.raises(NumericalError, match="a row's score is not finite"):
        Scorer(bank, model).rank(queries()[0], 2, 9)


@pytest.mark.parametrize("predictor", [True, False])
def test_candidates_are_the_best_and_the_worst_by_estimate(
    tmp_path: Path, predictor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer candidates than rows, the others keep the estimate of their coordinates."""
    monkeypatch.setattr("hf_fwdattr.query.two_stage._CANDIDATES", (6, 6))
    monkeypatch.setattr("hf_fwdattr.query.two_stage._CANDIDATES_PER_ROW", 1)
    monkeypatch.setattr("hf_fwdattr.query.two_stage._CANDIDATES_PER_NAME", 1)
    model, bank = tune(tmp_path, directions=6, gradient_predictor=predictor)
    scorer, read = Scorer(bank, model), list[int]()
    decode = ResponseBank.decode_rows

    def decode_rows(bank: ResponseBank, rows: Sequence[int]) -> torch.Tensor:
        read.extend(rows)
        return decode(bank, rows)

    monkeypatch.setattr("hf_fwdattr.query.row_codes._HELD", 0)
    monkeypatch.setattr(ResponseBank, "decode_rows", decode_rows)
    for query in queries():
        read.clear()
        along = scorer.scores([query], budget="all")[0].double()  # all directions
        stage = scorer._two_stage._first_stage(query, 6)  # the same, read in the first stage
        chosen = scorer._two_stage._candidates(stage, 1, 3)
        outside = (
            bank.outside().double()
            * (
                bank.manifest.outside_variance
                * float(stage.derivatives.square().sum())
                / bank.manifest.derivative_square
            )
            ** 0.5
        )
        sides = [(side * along + outside).topk(3).indices.tolist() for side in (1.0, -1.0)]
        assert set(chosen.tolist()) == set(sides[0] + sides[1])
        ranking = scorer.rank(query, 1, 9)
        assert len(set(read)) <= 6
        named = torch.cat([ranking.proponents.row_indices, ranking.opponents.row_indices])
        truth = scorer.row_scores(query, named.tolist())
        agree(torch.cat([ranking.proponents.scores, ranking.opponents.scores]).double(), truth, 1e-4)
        assert ranking.stds is not None
        assert bool(ranking.stds.isfinite().all())


@pytest.mark.parametrize("predictor", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_stated_deviations_hold(tmp_path: Path, predictor: bool, bits: int) -> None:
    """Rows beyond the sample are coded in few bits; scores are off by as much as is said."""
    settings = {"gradient_predictor": predictor, "row_code_bits": bits, "sample_rows": 8}
    model, bank = tune(tmp_path, directions=4, **settings)
    exact = tune(tmp_path / "exact", directions="exact")[1]
    truth = gradients(model, bank) @ responses(exact).T
    ratios = []
    for query, expected in zip(queries(), truth, strict=True):
        ranking = Scorer(bank, model).rank(query, 1, 7)
        assert ranking.stds is not None
        ratios.append((ranking.scores - expected) / ranking.stds)
    joined = torch.cat(ratios)
    assert bool(joined.isfinite().all())
    assert float((joined.abs() < 1).double().mean()) > 0.3
    assert float((joined.abs() < 3).double().mean()) > 0.7


def test_bank_of_sources_only_holds_no_row_codes(tmp_path: Path) -> None:
    _, bank = tune(tmp_path, directions=3, private_rows=True)
    assert bank.manifest.row_codes == 0
    assert not bank.manifest.error_projections


def test_adaptive_budget_names_the_rows_of_a_full_read(tuned: Tuned) -> None:
    kind, model, bank = tuned
    if kind == "row codes":
        results = [ask(model, bank)(ASKED, budget=budget, top_k=2)["examples"] for budget in ("adaptive", 100)]
        named = [[(example["row"], example["score"]) for example in examples] for examples in results]
        assert named[0] == named[1]


@pytest.mark.parametrize(("budget", "directions", "rows"), [(9, 2, 6), (17, 3, ROWS), ("adaptive", 3, None)])
def test_a_quarter_of_the_passes_goes_to_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: Any, directions: int, rows: int | None
) -> None:
    model, bank = tune(tmp_path, directions=3)
    prepare, counts = Backend.prepare, list[int]()

    class Counting:
        def __init__(self, prepared: PreparedBatch):
            self.prepared = prepared

        def jvp(self, directions: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
            counts.append(len(directions))
            return self.prepared.jvp(directions, chunk)

    monkeypatch.setattr(Backend, "prepare", lambda *args: Counting(prepare(*args)))
    passes = Scorer(bank, model).rank(queries()[0], 2, budget).passes
    assert passes == 1 + sum(counts)
    assert counts[0] == directions
    assert sum(counts[1:]) == rows or (rows is None and sum(counts[1:]) <= ROWS)


def test_inactive_adapters_are_refused_by_the_predictor(tmp_path: Path) -> None:
    model, bank = tune(tmp_path, directions=3)
    with model.disable_adapter(), pytest.raises(MismatchError, match="adapters are scaled by 0"):
        ask(model, bank)({"prompt": "w1 w2", "completion": " w3"}, budget=9, top_k=2)
    allowed = Scorer(bank, model, allow_mismatch=["weights"])
    with model.disable_adapter(), pytest.raises(UnsupportedError, match="merged or disabled"):
        allowed.rank(queries(1)[0], 2, 9)
    model.get_base_model().transformer.h[1].attn.c_attn.enable_adapters(False)
    predicted, parameters = allowed.predicted_gradients(queries(1)), bank.check_model(model, ["weights"])
    by_name = dict(zip(parameters.live, parameters.split(predicted), strict=True))
    inactive = [value for name, value in by_name.items() if "h.1.attn.c_attn" in name]
    assert inactive
    assert all(bool((value == 0).all()) for value in inactive)
    assert bool((predicted != 0).any())


def test_one_pass_serves_the_prediction_and_the_derivatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = tune(tmp_path, directions=3)
    scorer, passes, record = Scorer(bank, model), list[int](), GradientPredictor._record

    def counted(predictor: GradientPredictor, *given: Any) -> Any:
        passes.append(1)
        return record(predictor, *given)

    monkeypatch.setattr(GradientPredictor, "_record", counted)
    stage = scorer._two_stage._first_stage(queries()[0], 2)
    assert not passes
    assert stage.gradient is not None
    agree(stage.gradient, scorer.predicted_gradients(queries(1)), 1e-6)
    assert len(passes) == 1
    prepared: Any = stage.prepared
    assert prepared.take_recorded() is None  # its memory is free
    by_torch = Scorer(bank, model, readout="jvp")._two_stage._first_stage(queries()[0], 2)
    assert len(passes) == 2
    assert by_torch.gradient is not None
    agree(by_torch.gradient, stage.gradient, 1e-6)


def test_products_with_mapped_codes_are_those_of_all_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bank = tune(tmp_path, directions=3)
    monkeypatch.setattr("hf_fwdattr.query.row_codes._HELD", 0)
    held, vectors = HeldRowCodes(bank), torch.randn(2, bank.manifest.size, generator=torch.Generator().manual_seed(0))
    expected = vectors.double() @ responses(bank).T
    for rows in (torch.arange(ROWS), torch.tensor([1, 4, ROWS - 1])):
        agree(held.products(vectors, rows), expected[:, rows], 1e-5)
    monkeypatch.setattr(ResponseBank, "codes_of", None)  # they are not copied
    agree(held.products(vectors, torch.tensor([2])), expected[:, [2]], 1e-5)


def test_likely_candidates_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others keep the estimate of their codes, improved by what was read."""
    for name in ("_LIKELY", "_CANDIDATES_PER_ROW", "_CANDIDATES_PER_NAME"):
        monkeypatch.setattr(f"hf_fwdattr.query.two_stage.{name}", 1)
    model, bank = tune(tmp_path, directions=3)
    scorer = Scorer(bank, model)
    stage = scorer._two_stage._first_stage(queries()[0], 2)
    estimated = scorer._two_stage._candidate_scores(stage, torch.arange(ROWS))
    means, stds = estimated.mean(), estimated.std()
    likely = scorer._two_stage._likely(estimated, 1, 6)
    sides = [(side * means + stds).topk(3).indices.tolist() for side in (1.0, -1.0)]
    assert set(likely.tolist()) == set(sides[0] + sides[1])
    ranking = scorer.rank(queries()[0], 1, 9)
    named = torch.cat([ranking.proponents.row_indices, ranking.opponents.row_indices])
    assert set(named.tolist()) <= set(likely.tolist())
    truth = scorer.row_scores(queries()[0], range(ROWS))
    assert float((ranking.scores - truth).norm()) < float((means - truth).norm())
