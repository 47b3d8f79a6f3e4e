"""Regression of directional derivatives: leave-one-out as by refitting, and what is refused."""

import pytest
import torch
from torch import Tensor

from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.gradients.derivative_regression import DerivativeRegression, explained_variance


SIZES = [5, 40]


def data(rows: int = 30) -> tuple[Tensor, Tensor]:
    """Features of two groups of very different size, and targets that depend on both."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, sum(SIZES), generator=generator, dtype=torch.float64)
    features[:, SIZES[0] :] *= 100.0
    mixing = torch.randn(sum(SIZES), 4, generator=generator, dtype=torch.float64)
    mixing[SIZES[0] :] /= 300.0
    noise = 0.3 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return features + 7.0, features @ mixing + noise + 2.0


def refitted(fit: DerivativeRegression, features: Tensor, targets: Tensor, row: int) -> Tensor:
    """What a dense ridge regression with an unpenalised intercept, fitted without `row`, predicts for it."""
    x = (features - features.mean(0)) * fit.scales.double()
    ridge = fit.ridge * float(x.square().sum()) / len(x)
    others = [index for index in range(len(x)) if index != row]
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = torch.eye(design.shape[1], dtype=x.dtype) * ridge
    penalty[-1, -1] = 0.0
    kept = design[others]
    return design[row] @ torch.linalg.solve(kept.T @ kept + penalty, kept.T @ targets[others])


def test_left_out_predictions_equal_refitting() -> None:
    features, targets = data()
    fit = DerivativeRegression.fit(features, targets, SIZES)
    assert 0 < fit.ridge < float("inf")
    expected = torch.stack([refitted(fit, features, targets, row) for row in range(len(features))])
    torch.testing.assert_close(fit.left_out.double(), expected, rtol=1e-4, atol=1e-4)
    assert explained_variance(fit.left_out, targets) > 0.3


def test_prediction_equals_a_dense_ridge() -> None:
    features, targets = data()
    fit = DerivativeRegression.fit(features[:-1], targets[:-1], SIZES)
    x = (features - features[:-1].mean(0)) * fit.scales.double()
    ridge = fit.ridge * float(x[:-1].square().sum()) / (len(x) - 1)
    matrix = x[:-1].T @ x[:-1] + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    mean = targets[:-1].mean(0)
    expected = x @ torch.linalg.solve(matrix, x[:-1].T @ (targets[:-1] - mean)) + mean
    torch.testing.assert_close(fit.predict(features).double(), expected, rtol=1e-4, atol=1e-4)


def test_unrelated_targets_are_predicted_by_their_mean() -> None:
    features, _ = data(40)
    targets = torch.randn(40, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fit = DerivativeRegression.fit(features, targets, SIZES)
    assert fit.ridge >= 1000.0
    assert fit.predict(features).std(0).max() < 0.1


def test_explained_variance_is_that_of_scores() -> None:
    _, targets = data()
    coordinates = torch.randn(60, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    predicted = targets + 0.5
    scores, error = targets @ coordinates.T, (predicted - targets) @ coordinates.T
    expected = 1.0 - float(error.var(1, correction=0).sum() / scores.var(1, correction=0).sum())
    assert explained_variance(predicted, targets, coordinates) == pytest.approx(expected, rel=1e-9)


def test_broken_input_is_refused() -> None:
    features, targets = data()
    fit = DerivativeRegression.fit(features, targets, SIZES)
    with pytest.raises(UnsupportedError, match="fitted on 45"):
        fit.predict(features[:, :3])
    with pytest.raises(UnsupportedError, match="three rows"):
        DerivativeRegression.fit(features[:2], targets[:2])
    with pytest.raises(NumericalError, match="not finite"):
        DerivativeRegression.fit(features.masked_fill(features > 9, torch.inf), targets)
