import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_fwdattr.errors import NumericalError
from hf_fwdattr.response import low_rank
from hf_fwdattr.response.low_rank import combine, explained_variance, factorize, inner_products
from tests.helpers.reference import agree


ROWS, SIZE = 20, 30


def world(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, responses and diagonal; scores whose singular values fall by a third each."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    left, _ = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64))
    scores = (left * 0.7 ** torch.arange(ROWS)) @ right.T
    responses = torch.linalg.lstsq(gradients, scores).solution.T  # gradients @ responses.T = scores
    diagonal = 0.1 + torch.rand(SIZE, generator=generator, dtype=torch.float64)
    return gradients.to(dtype), responses.to(dtype), diagonal.to(dtype)


@pytest.mark.parametrize("k", [1, 2, 7, 19, 20])
def test_basis_error_is_the_omitted_singular_values(k: int) -> None:
    """No factorisation into k directions is better (Eckart and Young); own scores count where rows are few."""
    gradients, responses, diagonal = world()
    basis = factorize(gradients, responses, diagonal, k)
    assert basis.directions.shape == basis.adjoint_basis.shape == (k, SIZE)
    scores = gradients @ responses.T
    agree(basis.scores.whole, scores, 1e-12)
    if 2 * k < ROWS:
        scores = scores.fill_diagonal_(0.0)
    weights = torch.linalg.lstsq(responses.T, basis.directions.T).solution  # of rows in the directions
    error = scores - scores @ weights @ basis.coordinates.T
    values = np.linalg.svd(scores.numpy(), compute_uv=False)
    assert float(error.norm()) == pytest.approx(math.sqrt((values[k:] ** 2).sum()), rel=1e-8, abs=1e-10)


def test_as_many_directions_as_rows_lose_nothing() -> None:
    gradients, responses, diagonal = world()
    for k in (ROWS, 500):
        basis = factorize(gradients, responses, diagonal, k)
        assert len(basis.directions) == ROWS
        agree(basis.coordinates @ basis.directions, responses, 1e-8)
        assert basis.explained_variance == pytest.approx(1.0)


def test_adjoint_basis_turns_responses_into_coordinates() -> None:
    gradients, responses, diagonal = world()
    basis = factorize(gradients, responses, diagonal, 12)
    agree(responses @ basis.adjoint_basis.T, basis.coordinates, 1e-9)
    agree(basis.directions @ basis.adjoint_basis.T, torch.eye(12, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("k", [3, 12])
def test_predictions_and_their_errors_are_queries_of_equal_weight(k: int) -> None:
    """Coordinates are those of least squares over both kinds; errors along the directions are uncorrelated."""
    gradients, responses, diagonal = world()
    errors = 0.1 * torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = factorize(gradients, responses, diagonal, k, errors=errors)
    kinds = [gradients @ responses.T, errors @ responses.T]
    agree(basis.scores.remaining, kinds[1], 1e-9)
    if 2 * k < ROWS:
        kinds = [kind.fill_diagonal_(0.0) for kind in kinds]
    weights = torch.linalg.lstsq(responses.T, basis.directions.T).solution
    stacked = torch.cat([kind / kind.norm() for kind in (kinds[0] - kinds[1], kinds[1])])
    agree(torch.linalg.lstsq(stacked @ weights, stacked).solution.T, basis.coordinates, 1e-8)
    if 2 * k >= ROWS:
        agree(responses @ basis.adjoint_basis.T, basis.coordinates, 1e-8)
    along = kinds[1] @ weights
    covariance = along.T @ along / ROWS
    agree(covariance, covariance.diagonal().diag(), 1e-8)
    agree(covariance.diagonal(), basis.error_variances, 1e-8)
    information = covariance.diagonal() * basis.coordinates.square().sum(0)
    assert bool((information.diff() <= 1e-12).all())
    for variance, kind in zip(basis.outside_scores, kinds, strict=True):
        outside = kind - kind @ weights @ basis.coordinates.T
        growth = variance / outside.square().mean(0)  # for queries that were left out
        assert float(growth.min()) >= 1 - 1e-9
        agree(growth, growth[:1].expand(ROWS), 1e-8)
    assert basis.derivative_square == pytest.approx(float((kinds[0] @ weights).square().sum(1).mean()))


def test_directions_have_unit_norm_in_the_preconditioned_metric() -> None:
    gradients, responses, diagonal = world()
    directions = factorize(gradients, responses, diagonal, 6).directions
    agree((directions.square() / diagonal).sum(1), torch.ones(6, dtype=torch.float64), 1e-9)


def test_float32_basis_keeps_its_digits() -> None:
    gradients, responses, diagonal = world(torch.float32)
    basis = factorize(gradients, responses, diagonal, 5)
    assert basis.directions.dtype == torch.float32
    exact = factorize(*world(), 5)
    agree(basis.coordinates @ basis.directions.double(), exact.coordinates @ exact.directions, 1e-3)


def test_explained_variance_rises_from_zero_to_one() -> None:
    gradients, responses, _ = world()
    explained = explained_variance(gradients @ responses.T)
    assert explained.shape == (ROWS + 1,)
    assert explained[0] == 0.0
    assert explained[-1].item() == pytest.approx(1.0)
    assert bool((explained.diff() >= 0).all())
    assert bool((explained <= 1).all())


def test_explained_variance_is_that_of_held_out_queries() -> None:
    """Of scores without structure, k of 40 directions explain about k / 40 for a new query, but all for old ones."""
    scores = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    explained = explained_variance(scores)
    agree(explained, torch.arange(41) / 40, 0.15)
    shared = torch.rand(40, 1).double() @ torch.rand(1, 40).double()
    assert explained_variance(shared)[1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("variance", [0.3, 0.8, 0.95, 0.999])
def test_a_float_chooses_the_fewest_directions_that_explain_it(variance: float) -> None:
    gradients, responses, diagonal = world()
    basis = factorize(gradients, responses, diagonal, variance)
    k = len(basis.directions)
    assert basis.explained_variance >= variance
    assert k == 1 or factorize(gradients, responses, diagonal, k - 1).explained_variance < variance


def test_the_held_out_split_depends_on_the_seed() -> None:
    gradients, responses, diagonal = world()
    explained = [factorize(gradients, responses, diagonal, 3, seed).explained_variance for seed in (0, 0, 1)]
    assert explained[0] == explained[1] != explained[2]


def test_repeated_rows_need_no_more_directions() -> None:
    gradients, responses, diagonal = world()
    doubled = factorize(gradients.repeat(2, 1), responses.repeat(2, 1), diagonal, 500)
    assert len(doubled.directions) == ROWS
    agree(doubled.coordinates @ doubled.directions, responses.repeat(2, 1), 1e-7)


def test_rows_without_response_have_zero_coordinates() -> None:
    gradients, responses, diagonal = world()
    responses[4] = 0.0
    coordinates = factorize(gradients, responses, diagonal, 5).coordinates
    agree(1 + coordinates[4], torch.ones(5), 1e-12)


def test_responses_of_zero_are_refused() -> None:
    gradients, responses, diagonal = world()
    with pytest.raises(NumericalError, match="every response is zero"):
        factorize(gradients, 0 * responses, diagonal, 5)


def test_infinite_scores_are_refused() -> None:
    gradients, responses, diagonal = world()
    responses[0, 0] = math.inf
    with pytest.raises(NumericalError, match="not finite"):
        factorize(gradients, responses, diagonal, 5)


def test_column_blocks_do_not_change_products(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, responses, _ = world()
    monkeypatch.setattr(low_rank, "_WIDTH", 7)
    agree(inner_products(gradients, responses), gradients @ responses.T, 1e-12)
    agree(combine(gradients[:, :ROWS], responses), gradients[:, :ROWS] @ responses, 1e-12)
