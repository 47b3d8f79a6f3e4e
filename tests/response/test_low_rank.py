import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_fwdattr.errors import NumericalError
from hf_fwdattr.response import low_rank as room
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
def test_no_factorisation_of_rank_k_keeps_more_of_the_scores(k: int) -> None:
    """Eckart and Young: the error is the singular values that were left out."""
    gradients, responses, diagonal = world()
    basis = factorize(gradients, responses, diagonal, k)
    assert basis.directions.shape == basis.adjoint_basis.shape == (k, SIZE)
    scores = gradients @ responses.T
    error = scores - gradients @ basis.directions.T @ basis.coordinates.T
    values = np.linalg.svd(scores.numpy(), compute_uv=False)
    assert float(error.norm()) == pytest.approx(math.sqrt((values[k:] ** 2).sum()), rel=1e-8, abs=1e-10)


def test_as_many_probes_as_rows_lose_nothing_and_more_change_nothing() -> None:
    gradients, responses, diagonal = world()
    for k in (ROWS, 500):
        basis = factorize(gradients, responses, diagonal, k)
        assert len(basis.directions) == ROWS
        agree(basis.coordinates @ basis.directions, responses, 1e-8)
        assert basis.kept == pytest.approx(1.0)


def test_dual_probes_turn_responses_into_coordinates() -> None:
    gradients, responses, diagonal = world()
    basis = factorize(gradients, responses, diagonal, 6)
    agree(responses @ basis.adjoint_basis.T, basis.coordinates, 1e-9)
    agree(basis.directions @ basis.adjoint_basis.T, torch.eye(6, dtype=torch.float64), 1e-9)


def test_probes_are_of_unit_norm_in_the_preconditioned_metric() -> None:
    gradients, responses, diagonal = world()
    directions = factorize(gradients, responses, diagonal, 6).directions
    agree((directions.square() / diagonal).sum(1), torch.ones(6, dtype=torch.float64), 1e-9)


def test_float32_keeps_its_digits() -> None:
    gradients, responses, diagonal = world(torch.float32)
    basis = factorize(gradients, responses, diagonal, 5)
    assert basis.directions.dtype == torch.float32
    exact = factorize(*world(), 5)
    agree(basis.coordinates @ basis.directions.double(), exact.coordinates @ exact.directions, 1e-3)


def test_kept_variance_rises_from_nothing_to_everything() -> None:
    gradients, responses, _ = world()
    kept = explained_variance(gradients @ responses.T)
    assert kept.shape == (ROWS + 1,)
    assert kept[0] == 0.0
    assert kept[-1].item() == pytest.approx(1.0)
    assert bool((kept.diff() >= 0).all())
    assert bool((kept <= 1).all())


def test_kept_variance_is_that_of_queries_the_basis_has_not_seen() -> None:
    """Scores without structure: k of the 40 directions keep about k/40 of a new query, though all of the old ones."""
    scores = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = explained_variance(scores)
    agree(kept, torch.arange(41) / 40, 0.15)
    shared = torch.rand(40, 1).double() @ torch.rand(1, 40).double()
    assert explained_variance(shared)[1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("wanted", [0.3, 0.8, 0.95, 0.999])
def test_a_float_asks_for_the_least_k_that_keeps_it(wanted: float) -> None:
    gradients, responses, diagonal = world()
    basis = factorize(gradients, responses, diagonal, wanted)
    k = len(basis.directions)
    assert basis.kept >= wanted
    assert k == 1 or factorize(gradients, responses, diagonal, k - 1).kept < wanted


def test_the_split_is_the_seeds() -> None:
    gradients, responses, diagonal = world()
    kept = [factorize(gradients, responses, diagonal, 3, seed).kept for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


def test_rows_that_repeat_cost_no_probe() -> None:
    gradients, responses, diagonal = world()
    doubled = factorize(gradients.repeat(2, 1), responses.repeat(2, 1), diagonal, 500)
    assert len(doubled.directions) == ROWS
    agree(doubled.coordinates @ doubled.directions, responses.repeat(2, 1), 1e-7)


def test_a_row_that_does_not_respond_has_no_coordinates() -> None:
    gradients, responses, diagonal = world()
    responses[4] = 0.0
    coordinates = factorize(gradients, responses, diagonal, 5).coordinates
    agree(1 + coordinates[4], torch.ones(5), 1e-12)


def test_nothing_that_responds_is_refused() -> None:
    gradients, responses, diagonal = world()
    with pytest.raises(NumericalError, match="every response is zero"):
        factorize(gradients, 0 * responses, diagonal, 5)


def test_scores_that_are_not_finite_are_refused() -> None:
    gradients, responses, diagonal = world()
    responses[0, 0] = math.inf
    with pytest.raises(NumericalError, match="not finite"):
        factorize(gradients, responses, diagonal, 5)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, responses, _ = world()
    monkeypatch.setattr(room, "_WIDTH", 7)
    agree(inner_products(gradients, responses), gradients @ responses.T, 1e-12)
    agree(combine(gradients[:, :ROWS], responses), gradients[:, :ROWS] @ responses, 1e-12)
