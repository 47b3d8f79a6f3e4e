"""Regression of derivatives from end to end: what a bank expects of a query that it has never seen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import default_data_collator

from hf_fwdattr import ResponseBank
from hf_fwdattr.gradients.derivative_regression import DerivativeRegression
from hf_fwdattr.gradients.forward_features import ForwardFeatures
from hf_fwdattr.gradients.predicted_derivatives import column_groups, grouped_derivatives
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.scorer import Scorer
from tests.helpers.cases import adapted, token_rows
from tests.helpers.reference import agree
from tests.helpers.runs import base, config, fine_tune, training_set
from tests.query.test_classifiers import classifier


ROWS, K, UNSEEN = 96, 6, 90  # the last six rows are never trained on
Asked = tuple[str, Any, ResponseBank, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["predictor", "classifier"])
def asked(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """A fine-tuned model, its bank, and queries; a language model with a gradient predictor, a classifier without."""
    folder: Path = tmp_path_factory.mktemp("run")
    settings: dict[str, Any] = {"directions": K, "curvature_samples": 32, "source_directions": 0, "row_code_bits": 8}
    few = {"max_steps": UNSEEN // 3}
    if request.param == "predictor":
        model: Any = adapted(base())
        bank = fine_tune(folder, model, config(**settings), training_set(ROWS), **few).bank
        questions = token_rows(24, seed=9)
    else:
        model = classifier()
        labelled = [
            {
                "input_ids": [1 + (i * 5 + t * (1 + i % 7)) % 22 for t in range(6)],
                "labels": i % 3,
                "source": f"s{i % 2}",
            }
            for i in range(ROWS)
        ]
        settings["parameters"] = "trainable"
        dataset = Dataset.from_list(labelled)
        bank = fine_tune(folder, model, config(**settings), dataset, collate=default_data_collator, **few).bank
        questions = [
            {"input_ids": [1 + (i * 3 + t * (2 + i % 5)) % 22 for t in range(6)], "labels": [i % 3]} for i in range(24)
        ]
    assert bank is not None
    return request.param, model.eval(), bank, questions


def expected_derivatives(asked: Asked) -> Tensor:
    """Return what the bank expects of every query beyond what is predicted, (queries, k), by the definitions."""
    kind, model, bank, questions = asked
    scorer, regression = Scorer(bank, model), DerivativeRegression.from_tensors(bank.derivative_regression())
    if kind == "predictor":
        gradients = scorer.predicted_gradients(questions)
        features = grouped_derivatives(gradients, bank.directions()[:K], column_groups(scorer.parameters.sizes))
    else:
        compute = ForwardFeatures(model, scorer.parameters, scorer._derivatives.objective)
        features = torch.cat([compute(scorer.batch([question])) for question in questions])
    return regression(features)


def predicted_scores(asked: Asked) -> Tensor:
    """Return the products of predicted gradients with row codes, (queries, rows); zero without a predictor."""
    kind, model, bank, questions = asked
    if kind == "classifier":
        return torch.zeros(len(questions), ROWS, dtype=torch.float64)
    responses = torch.cat([block.decode() for block in bank.row_codes()]).double()
    return Scorer(bank, model).predicted_gradients(questions).double() @ responses.T


def coordinates(bank: ResponseBank) -> Tensor:
    return torch.cat([block for _, _, block in bank.coordinates()]).double()


def test_first_pass_adds_what_is_expected(asked: Asked) -> None:
    _, model, bank, questions = asked
    assert bank.manifest.regression_features > 0
    expected = expected_derivatives(asked)
    assert float(expected.norm()) > 0
    scores = Scorer(bank, model).scores(questions, budget=1).double()
    agree(scores, predicted_scores(asked) + expected @ coordinates(bank).T, 1e-4)


def test_expectation_is_nearer_to_exact_derivatives_of_new_queries(asked: Asked) -> None:
    kind, model, bank, questions = asked
    scorer = Scorer(bank, model)
    exact = scorer.directional_derivatives(questions, slice(0, K)).double().sum(1)
    if kind == "predictor":
        exact = exact - scorer.predicted_gradients(questions).double() @ bank.directions()[:K].double().T
    weight = coordinates(bank).square().sum(0)  # what an error means for rows' scores
    before, after = (float((part.square() * weight).sum()) for part in (exact, exact - expected_derivatives(asked)))
    assert after < 0.9 * before


def test_variances_are_those_of_what_remains(asked: Asked) -> None:
    """Of new queries, though they are not the rows: the sum over directions by what it means for scores."""
    kind, model, bank, questions = asked
    scorer = Scorer(bank, model)
    exact = scorer.directional_derivatives(questions, slice(0, K)).double().sum(1)
    if kind == "predictor":
        exact = exact - scorer.predicted_gradients(questions).double() @ bank.directions()[:K].double().T
    weight = coordinates(bank).square().sum(0)
    found = float(((exact - expected_derivatives(asked)).square().mean(0) * weight).sum())
    stated = float((torch.tensor(bank.manifest.error_variances, dtype=torch.float64) * weight).sum())
    assert 0.2 < found / stated < 2.0


def test_unseen_rows_score_zero(asked: Asked) -> None:
    _, model, bank, questions = asked
    untrained = coordinates(bank).abs().sum(1) == 0
    assert int(untrained.sum()) == ROWS - UNSEEN
    for budget in (1, 12):
        scores = Scorer(bank, model).scores(questions[:3], budget=budget)
        assert not bool(scores[:, untrained].any())


def test_sources_are_the_sums_of_their_rows(asked: Asked) -> None:
    _, model, bank, questions = asked
    scorer = Scorer(bank, model)
    (attribution,) = scorer.attribute(questions[:1], 3, 2 * ROWS)
    scores = scorer.scores(questions[:1])[0].double()
    sources = torch.cat([sources for _, sources, _ in bank.coordinates()])
    sums = torch.stack([scores[sources == index].sum() for index in range(len(bank.manifest.sources))])
    agree(attribution.sources, sums, 2e-2)  # directions keep them up to the jitter of the process


def test_bank_says_what_the_regression_explains(asked: Asked) -> None:
    kind, _, bank, _ = asked
    explained = bank.manifest.regression_explained_variance
    assert explained is not None
    assert explained <= 1
    assert kind == "predictor" or explained > 0


def test_custom_likelihood_is_not_expected(tmp_path: Path) -> None:
    """A bank knows that there was one, but not which: a query's features would be others than the rows'."""
    settings = config(directions=K, curvature_samples=32, objective=CAUSAL_LM.forward)
    model = adapted(base())
    bank = fine_tune(tmp_path, model, settings, training_set(ROWS), max_steps=UNSEEN // 3).bank
    assert bank is not None
    assert bank.manifest.regression_features == 0
    ranking = Scorer(bank, model.eval()).rank(token_rows(1, seed=9)[0], 2, 9)
    assert len(ranking.proponents.row_indices) == 2


def test_without_a_predictor_wanted_nothing_is_expected(tmp_path: Path) -> None:
    settings = config(directions=K, curvature_samples=32, gradient_predictor=False)
    bank = fine_tune(tmp_path, adapted(base()), settings, training_set(ROWS), max_steps=8).bank
    assert bank is not None
    assert bank.manifest.regression_features == 0
    assert bank.derivative_regression() == {}
    assert bank.manifest.row_codes == ROWS
