"""Responses in one byte a number: how far off they may be, and that they never are further."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fwdattr.bank.codes import WIDTH, RowCodes, group_count
from tests.helpers.reference import agree


def matrix(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-6, 3, (rows, size), generator=generator)
    return torch.randn(rows, size, generator=generator) * scales


@pytest.mark.parametrize("size", [1, WIDTH - 1, WIDTH, 3 * WIDTH + 5])
def test_a_number_is_off_by_half_a_step_at_most(size: int) -> None:
    exact = matrix(4, size)
    packed = RowCodes.of(exact)
    assert packed.steps.shape == (4, group_count(size))
    steps = packed.steps.repeat_interleave(WIDTH, dim=1)[:, :size]
    assert bool(((packed.decode() - exact).abs() <= steps * 0.5001).all())
    largest = exact.abs().flatten().argmax()
    assert float(packed.decode().flatten()[largest]) == pytest.approx(float(exact.flatten()[largest]), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 300), seed=st.integers(0, 99))
def test_products_stay_within_their_bound(rows: int, size: int, seed: int) -> None:
    exact, vectors = matrix(rows, size, seed), matrix(3, size, seed + 1)
    packed = RowCodes.of(exact)
    off = (packed.products(vectors) - vectors.double() @ exact.double().T).abs()
    rounding = 1e-5 * vectors.double().abs() @ exact.double().abs().T
    assert bool((off <= packed.bound(vectors) + rounding).all())


def test_a_row_of_zeros_stays_one_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = matrix(9, 200)
    exact[4] = 0.0
    whole, vectors = RowCodes.of(exact), matrix(2, 200, 1)
    products = whole.products(vectors)
    assert bool((whole.decode()[4] == 0).all())
    assert bool((products[:, 4] == 0).all())
    monkeypatch.setattr("hf_fwdattr.bank.codes._CHUNK", 450)
    assert torch.equal(RowCodes.of(exact).values, whole.values)
    agree(RowCodes.of(exact).products(vectors), products, 1e-6)
