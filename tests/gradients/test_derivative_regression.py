"""Regression of derivatives: against dense ridge regressions in float64, and refitted without each row."""

import pytest
import torch
from torch import Tensor

from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.gradients.derivative_regression import (
    LEAST_ROWS,
    DerivativeRegression,
    FeatureTable,
    fit_regression,
)
from tests.helpers.reference import agree


SIZES, K = [5, 40], 4
ROWS = LEAST_ROWS + 2


def table(features: Tensor, leading: int = 2) -> FeatureTable:
    return FeatureTable(features, SIZES, leading)


def data(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Features of two groups of very different size, and targets that depend on both."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, sum(SIZES), generator=generator, dtype=torch.float64)
    mixing = torch.randn(sum(SIZES), K, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(rows, K, generator=generator, dtype=torch.float64)
    targets = features @ mixing + noise + 2.0
    features[:, SIZES[0] :] *= 100.0
    return features + 7.0, targets


def ridge_of(regression: DerivativeRegression, features: Tensor, targets: Tensor) -> float:
    """Return the ridge that was chosen, from the equation that its weights solve: X'(y - Xw) = ridge w."""
    x = (features - features.mean(0)) * regression.scales.double()
    weights = regression.weights.double()
    gradient = x.T @ (targets - targets.mean(0) - x @ weights)
    return float((gradient * weights).sum() / weights.square().sum())


def dense(x: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return the coefficients (F + 1, k) of a ridge regression whose intercept, the last, is not penalised."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = ridge * torch.eye(design.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0.0
    return torch.linalg.solve(design.T @ design + penalty, design.T @ targets)


def test_regression_is_a_dense_ridge_and_leaves_rows_out_as_refitting_does() -> None:
    features, targets = data()
    fitted = fit_regression(table(features), targets)
    assert fitted is not None
    regression, left_out = fitted
    x = (features - features.mean(0)) * regression.scales.double()
    ridge = ridge_of(regression, features, targets)
    coefficients = dense(x, targets, ridge)
    agree(regression(features), x @ coefficients[:-1] + coefficients[-1], 1e-4)
    for row in range(0, ROWS, 7):
        others = torch.arange(ROWS) != row
        coefficients = dense(x[others], targets[others], ridge)
        agree(left_out[row], x[row] @ coefficients[:-1] + coefficients[-1], 1e-4)


def test_groups_have_the_same_variance() -> None:
    features, targets = data()
    fitted = fit_regression(table(features), targets)
    assert fitted is not None
    scaled = (features - features.mean(0)) * fitted[0].scales.double()
    variances = [part.square().sum(1).mean() for part in scaled.split(SIZES, 1)]
    agree(torch.stack(variances), torch.ones(2).double(), 1e-5)


def test_shuffled_targets_gain_nothing() -> None:
    features, targets = data(200)
    targets = targets - targets.mean(0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert fit_regression(table(features), targets) is not None
    assert fit_regression(table(features), targets[order]) is None


def test_gain_holds_on_rows_that_were_never_seen() -> None:
    features, targets = data(200)
    fitted = fit_regression(table(features[:100]), targets[:100])
    assert fitted is not None
    stated = float((fitted[1] - targets[:100]).square().mean())
    unseen = float((fitted[0](features[100:]) - targets[100:]).square().mean())
    assert unseen < 0.3 * float(targets[100:].var(0).mean())
    assert 0.5 < stated / unseen < 2


def test_many_features_are_left_out_where_few_do_better() -> None:
    features, _ = data()
    targets = features[:, : SIZES[0]] @ torch.ones(SIZES[0], K).double()
    fitted = fit_regression(table(features, leading=1), targets)
    assert fitted is not None
    assert not bool(fitted[0].scales[SIZES[0] :].any())
    changed = features.clone()
    changed[:, SIZES[0] :] = 0.0
    assert torch.equal(fitted[0](changed), fitted[0](features))


def test_constant_features_are_left_out() -> None:
    features, targets = data()
    features[:, : SIZES[0]] = 0.1
    fitted = fit_regression(table(features.float()), targets)
    assert fitted is not None
    assert not bool(fitted[0].scales[: SIZES[0]].any())
    assert bool(fitted[0].weights.isfinite().all())


def test_a_bank_keeps_the_regression() -> None:
    features, targets = data()
    fitted = fit_regression(table(features), targets)
    assert fitted is not None
    kept = DerivativeRegression.from_tensors(fitted[0].tensors())
    agree(kept(features), fitted[0](features), 0.01)  # weights in bfloat16
    factors = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    agree(fitted[0].along(factors)(features), fitted[0](features) * factors, 1e-5)


def test_few_rows_have_no_regression() -> None:
    features, targets = data(LEAST_ROWS)
    assert fit_regression(table(features), targets) is not None
    assert fit_regression(table(features[1:]), targets[1:]) is None


def test_broken_input_is_refused() -> None:
    features, targets = data()
    fitted = fit_regression(table(features), targets)
    assert fitted is not None
    with pytest.raises(UnsupportedError, match="fitted on 45"):
        fitted[0](features[:, :3])
    with pytest.raises(NumericalError, match="not finite"):
        fit_regression(table(features.masked_fill(features > 9, torch.inf)), targets)
