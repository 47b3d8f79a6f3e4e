"""Row codes: numbers and products stay within their error bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fwdattr.bank.codes import RowCodes, group_count
from hf_fwdattr.bank.schema import GROUP
from tests.helpers.reference import agree


def matrix(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-6, 3, (rows, size), generator=generator)
    return torch.randn(rows, size, generator=generator) * scales


@pytest.mark.parametrize("size", [1, GROUP - 1, GROUP, 3 * GROUP + 5])
def test_decoded_number_is_off_by_half_a_scale_at_most(size: int) -> None:
    exact = matrix(4, size)
    codes = RowCodes.of(exact)
    assert codes.scales.shape == (4, group_count(size))
    scales = codes.scales.repeat_interleave(GROUP, dim=1)[:, :size]
    assert bool(((codes.decode() - exact).abs() <= scales * 0.5001).all())
    largest = exact.abs().flatten().argmax()
    assert float(codes.decode().flatten()[largest]) == pytest.approx(float(exact.flatten()[largest]), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 300), seed=st.integers(0, 99))
def test_products_stay_within_their_bound(rows: int, size: int, seed: int) -> None:
    exact, vectors = matrix(rows, size, seed), matrix(3, size, seed + 1)
    codes = RowCodes.of(exact)
    off = (codes.products(vectors) - vectors.double() @ exact.double().T).abs()
    rounding = 1e-5 * vectors.double().abs() @ exact.double().abs().T
    assert bool((off <= codes.bound(vectors) + rounding).all())


def test_zero_row_stays_zero_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = matrix(9, 200)
    exact[4] = 0.0
    whole, vectors = RowCodes.of(exact), matrix(2, 200, 1)
    products = whole.products(vectors)
    assert bool((whole.decode()[4] == 0).all())
    assert bool((products[:, 4] == 0).all())
    monkeypatch.setattr("hf_fwdattr.bank.codes._CHUNK", 450)
    assert torch.equal(RowCodes.of(exact).codes, whole.codes)
    agree(RowCodes.of(exact).products(vectors), products, 1e-6)
