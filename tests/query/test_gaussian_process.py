"""Kriging against the textbook's conditional distribution, and its laws."""

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


def conditional(kernel: Tensor, prior: Tensor, weights: Tensor, readouts: Tensor) -> Tensor:
    """Mean of a Gaussian N(prior, kernel) given `weights.T @ scores`: by its joint precision."""
    noise = 1e-3 * (weights.T @ kernel @ weights).diagonal().mean()
    precision = torch.linalg.inv(kernel) + weights @ weights.T / noise
    return torch.linalg.solve(precision, torch.linalg.solve(kernel, prior) + weights @ readouts / noise)


def test_the_kernel_is_the_covariance_without_what_rows_say_of_themselves(errors: Tensor) -> None:
    expected = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for query in range(ROWS):
        seen = [0.0 if row == query else float(errors[query, row]) for row in range(ROWS)]
        expected += torch.outer(torch.tensor(seen).double(), torch.tensor(seen).double())
    expected /= expected.trace() / ROWS
    agree(error_covariance(errors), expected, 1e-3)
    assert error_covariance(errors).dtype == torch.float16
    assert not torch.equal(error_covariance(errors), error_covariance(errors.T))


@pytest.mark.parametrize("kind", ["rows", "mixtures", "both"])
def test_what_is_expected_is_the_conditional_mean(errors: Tensor, kind: str) -> None:
    kernel = error_covariance(errors).double() + 0.1 * torch.eye(ROWS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    prior, scores = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    places = torch.tensor([6, 1, 3])
    mixed = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    unit = torch.eye(ROWS, dtype=torch.float64)[:, places]
    learned, weights = GaussianProcess(prior, kernel), []
    if kind != "mixtures":
        learned.rows(places, scores[places])
        weights.append(unit)
    if kind != "rows":
        learned.mixtures(mixed, mixed.T @ (scores - prior))
        weights.append(mixed)
    joined = torch.cat(weights, 1)
    agree(learned.expected(), conditional(kernel, prior, joined, joined.T @ scores), 1e-5)


def test_one_after_the_other_is_all_at_once(errors: Tensor) -> None:
    kernel, prior, scores = error_covariance(errors), torch.zeros(ROWS), torch.arange(ROWS, dtype=torch.float64)
    once, turns = GaussianProcess(prior, kernel), GaussianProcess(prior, kernel)
    once.rows(torch.tensor([5, 0, 2]), scores[[5, 0, 2]])
    for place in (2, 5, 0):
        turns.rows(torch.tensor([place]), scores[[place]])
    agree(turns.expected(), once.expected(), 1e-9)


def test_nothing_read_is_what_was_expected(errors: Tensor) -> None:
    prior = torch.randn(ROWS)
    assert torch.equal(GaussianProcess(prior, error_covariance(errors)).expected(), prior.double())


def test_the_kernels_scale_does_not_matter(errors: Tensor) -> None:
    kernel = error_covariance(errors).double()
    found = []
    for scale in (1.0, 1e-3):
        learned = GaussianProcess(torch.zeros(ROWS), scale * kernel)
        learned.rows(torch.tensor([4, 7]), torch.tensor([1.0, -2.0]))
        found.append(learned.expected())
    agree(found[1], found[0], 1e-6)


def test_rows_that_share_nothing_with_what_was_read_stay(errors: Tensor) -> None:
    kernel = error_covariance(errors).double()
    kernel[:3, 3:] = kernel[3:, :3] = 0.0
    learned = GaussianProcess(torch.ones(ROWS), kernel)
    learned.rows(torch.tensor([0, 2]), torch.tensor([5.0, -5.0]))
    found = learned.expected()
    assert torch.equal(found[3:], torch.ones(ROWS, dtype=torch.float64)[3:])
    assert float((found[:3] - 1.0).abs().min()) > 0


def test_a_kernel_of_zeros_changes_nothing() -> None:
    learned = GaussianProcess(torch.ones(3), error_covariance(torch.zeros(3, 3)))
    learned.rows(torch.tensor([1]), torch.tensor([7.0]))
    assert torch.equal(learned.expected(), torch.ones(3, dtype=torch.float64))


def test_deviations_are_those_of_the_conditional_distribution(errors: Tensor) -> None:
    kernel = error_covariance(errors).double() + 0.1 * torch.eye(ROWS, dtype=torch.float64)
    places, scores = torch.tensor([6, 1, 3]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    learned = GaussianProcess(torch.zeros(ROWS), kernel)
    assert bool(learned.deviations().isinf().all())
    learned.rows(places, scores)
    gram = kernel[places][:, places]
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    left = kernel - kernel[:, places] @ torch.linalg.inv(gram) @ kernel[places]
    scale = scores @ torch.linalg.inv(gram) @ scores / 3
    agree(learned.deviations(), (scale * left.diagonal()).sqrt(), 1e-9)
    rescaled = GaussianProcess(torch.zeros(ROWS), 5 * kernel)
    rescaled.rows(places, scores)
    agree(rescaled.deviations(), learned.deviations(), 1e-9)
