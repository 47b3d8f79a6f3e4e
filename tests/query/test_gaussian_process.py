"""Gaussian process against the textbook's conditional distribution, and its laws."""

import pytest
import torch
from torch import Tensor

from hf_fwdattr.query.gaussian_process import GaussianProcess, error_covariance
from tests.helpers.reference import agree


ROWS = 9


@pytest.fixture
def errors() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    return shared @ shared.T + 0.3 * torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64)


def conditional(covariance: Tensor, prior: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Mean of a Gaussian N(prior, covariance) given `weights.T @ scores`, by its joint precision."""
    noise = 1e-3 * (weights.T @ covariance @ weights).diagonal().mean()
    precision = torch.linalg.inv(covariance) + weights @ weights.T / noise
    return torch.linalg.solve(precision, torch.linalg.solve(covariance, prior) + weights @ values / noise)


def test_error_covariance_leaves_out_the_diagonal(errors: Tensor) -> None:
    expected = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for query in range(ROWS):
        errors_of_query = [0.0 if row == query else float(errors[query, row]) for row in range(ROWS)]
        expected += torch.outer(torch.tensor(errors_of_query).double(), torch.tensor(errors_of_query).double())
    expected /= expected.trace() / ROWS
    agree(error_covariance(errors), expected, 1e-3)
    assert error_covariance(errors).dtype == torch.float16
    assert not torch.equal(error_covariance(errors), error_covariance(errors.T))


@pytest.mark.parametrize("kind", ["rows", "combinations", "both"])
def test_mean_is_the_conditional_mean(errors: Tensor, kind: str) -> None:
    covariance = error_covariance(errors).double() + 0.1 * torch.eye(ROWS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    prior, scores = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    row_indices = torch.tensor([6, 1, 3])
    combined = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    unit = torch.eye(ROWS, dtype=torch.float64)[:, row_indices]
    process, weights = GaussianProcess(prior, covariance), []
    if kind != "combinations":
        process.observe_rows(row_indices, scores[row_indices])
        weights.append(unit)
    if kind != "rows":
        process.observe_combinations(combined, combined.T @ scores)
        weights.append(combined)
    joined = torch.cat(weights, 1)
    agree(process.mean(), conditional(covariance, prior, joined, joined.T @ scores), 1e-5)


def test_observations_in_turns_equal_observations_at_once(errors: Tensor) -> None:
    covariance, prior, scores = error_covariance(errors), torch.zeros(ROWS), torch.arange(ROWS, dtype=torch.float64)
    at_once, in_turns = GaussianProcess(prior, covariance), GaussianProcess(prior, covariance)
    at_once.observe_rows(torch.tensor([5, 0, 2]), scores[[5, 0, 2]])
    for row in (2, 5, 0):
        in_turns.observe_rows(torch.tensor([row]), scores[[row]])
    agree(in_turns.mean(), at_once.mean(), 1e-9)


def test_mean_without_observations_is_the_prior(errors: Tensor) -> None:
    prior = torch.randn(ROWS)
    assert torch.equal(GaussianProcess(prior, error_covariance(errors)).mean(), prior.double())


def test_scale_of_the_covariance_does_not_matter(errors: Tensor) -> None:
    covariance = error_covariance(errors).double()
    found = []
    for scale in (1.0, 1e-3):
        process = GaussianProcess(torch.zeros(ROWS), scale * covariance)
        process.observe_rows(torch.tensor([4, 7]), torch.tensor([1.0, -2.0]))
        found.append(process.mean())
    agree(found[1], found[0], 1e-6)


def test_uncorrelated_rows_keep_their_prior(errors: Tensor) -> None:
    covariance = error_covariance(errors).double()
    covariance[:3, 3:] = covariance[3:, :3] = 0.0
    process = GaussianProcess(torch.ones(ROWS), covariance)
    process.observe_rows(torch.tensor([0, 2]), torch.tensor([5.0, -5.0]))
    found = process.mean()
    assert torch.equal(found[3:], torch.ones(ROWS, dtype=torch.float64)[3:])
    assert float((found[:3] - 1.0).abs().min()) > 0


def test_zero_covariance_changes_nothing() -> None:
    process = GaussianProcess(torch.ones(3), error_covariance(torch.zeros(3, 3)))
    process.observe_rows(torch.tensor([1]), torch.tensor([7.0]))
    assert torch.equal(process.mean(), torch.ones(3, dtype=torch.float64))


def test_std_is_that_of_the_conditional_distribution(errors: Tensor) -> None:
    covariance = error_covariance(errors).double() + 0.1 * torch.eye(ROWS, dtype=torch.float64)
    row_indices, scores = torch.tensor([6, 1, 3]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    process = GaussianProcess(torch.zeros(ROWS), covariance)
    assert bool(process.std().isinf().all())
    process.observe_rows(row_indices, scores)
    gram = covariance[row_indices][:, row_indices]
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    left = covariance - covariance[:, row_indices] @ torch.linalg.inv(gram) @ covariance[row_indices]
    scale = scores @ torch.linalg.inv(gram) @ scores / 3
    agree(process.std(), (scale * left.diagonal()).sqrt(), 1e-9)
    rescaled = GaussianProcess(torch.zeros(ROWS), 5 * covariance)
    rescaled.observe_rows(row_indices, scores)
    agree(rescaled.std(), process.std(), 1e-9)
