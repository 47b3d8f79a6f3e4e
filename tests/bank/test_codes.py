"""Row codes: rotation, unbiased products, and the noise that each number of bits leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fwdattr.bank.codes import NOISE, RowCodes, rotate, unrotate
from hf_fwdattr.bank.schema import BITS, code_blocks
from tests.helpers.reference import agree


def matrix(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    """Rows whose numbers differ by many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-6, 3, (rows, size), generator=generator)
    return torch.randn(rows, size, generator=generator) * scales


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 5000))
def test_blocks_cover_a_vector_with_little_to_spare(size: int) -> None:
    count, block = code_blocks(size)
    assert block in (8, 16, 32, 64, 128, 256, 512, 1024)
    assert size <= count * block < size + block
    assert count * block <= 1.05 * size or all(-(-size // n) * n >= count * block for n in (8, 16, 32, 64, 128))


@pytest.mark.parametrize("size", [1, 50, 1000, 1024, 3000])
def test_rotation_keeps_inner_products_and_is_undone(size: int) -> None:
    exact = matrix(4, size)
    rotated = rotate(exact)
    agree(unrotate(rotated, size), exact, 1e-6)
    agree(rotated.flatten(1) @ rotated.flatten(1).T, exact @ exact.T, 1e-5)
    kurtosis = rotate(torch.eye(size)[:1] * 3.0).flatten()
    assert float(kurtosis.abs().max()) == pytest.approx(3.0 / code_blocks(size)[1] ** 0.5)  # one number is spread out


def test_weights_lessen_the_noise_where_gradients_and_responses_differ() -> None:
    """Scores are as before; of all weights the ratio of sizes leaves the least noise."""
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** (2 * torch.rand(2, 2048, generator=generator) - 1)
    exact, vectors = (torch.randn(50, 2048, generator=generator) * size for size in sizes)
    truth, noise = vectors.double() @ exact.double().T, []
    for power in (0.0, 0.25, 0.5, 1.0):
        weights = (sizes[1] / sizes[0]) ** power
        codes = RowCodes.of(exact, 2, weights)
        noise.append(float((codes.products(vectors) - truth).norm()))
        agree(codes.products(vectors), vectors.double() @ codes.decode().double().T, 1e-5)
        agree((codes.decode() * exact * weights**2).sum(1), (exact * weights).square().sum(1), 1e-4)
    assert noise[2] == min(noise)
    assert noise[2] < 0.7 * noise[0]


@pytest.mark.parametrize("bits", BITS)
def test_code_is_unbiased_and_as_noisy_as_its_bits_say(bits: int) -> None:
    exact, vectors = matrix(40, 4096), torch.randn(60, 4096, generator=torch.Generator().manual_seed(5))
    codes = RowCodes.of(exact, bits)
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.shape == (40, 4096 * bits // 8)
    agree((codes.decode() * exact).sum(1), exact.square().sum(1), 1e-5)
    off = codes.products(vectors) - vectors.double() @ exact.double().T
    scale = vectors.double().square().sum(1)[:, None] * codes.decode().double().square().sum(1) / 4096
    assert float((off.square() / scale).mean()) == pytest.approx(NOISE[bits], rel=0.3)
    assert abs(float((off / scale.sqrt()).mean())) < 4 * (NOISE[bits] / off.numel()) ** 0.5


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 300), seed=st.integers(0, 99), bits=st.sampled_from(BITS))
def test_products_are_those_of_the_decoded_rows(rows: int, size: int, seed: int, bits: int) -> None:
    exact, vectors = matrix(rows, size, seed), matrix(3, size, seed + 1)
    codes = RowCodes.of(exact, bits)
    decoded = codes.decode().double()
    off = (codes.products(vectors) - vectors.double() @ decoded.T).abs()
    assert bool((off <= 1e-5 * vectors.double().norm(dim=1)[:, None] * decoded.norm(dim=1)).all())


def test_zero_row_stays_zero_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = matrix(9, 200)
    exact[4] = 0.0
    for bits in BITS:
        whole, vectors = RowCodes.of(exact, bits), matrix(2, 200, 1)
        products = whole.products(vectors)
        assert bool((whole.decode()[4] == 0).all())
        assert bool((products[:, 4] == 0).all())
        with monkeypatch.context() as patch:
            patch.setattr("hf_fwdattr.bank.codes._CHUNK", 450)
            assert torch.equal(RowCodes.of(exact, bits).codes, whole.codes)
            agree(RowCodes.of(exact, bits).products(vectors), products, 1e-6)


def test_codes_are_the_same_everywhere() -> None:
    """The signs are part of the format: a bank from another machine must decode as it was written."""
    exact = torch.arange(1.0, 21.0)[None] / 7
    codes = RowCodes.of(exact, 4)
    assert codes.codes.tolist() == CODES
    assert rotate(torch.ones(1, 20)).flatten().tolist() == pytest.approx(ROTATED, abs=1e-6)


CODES = [[138, 149, 43, 105, 94, 88, 87, 149, 137, 130, 136, 214]]
ROTATED = [
    1.06066,
    -1.06066,
    0.353553,
    -0.353553,
    0.353553,
    -0.353553,
    -1.767767,
    -1.06066,
    1.767767,
    -0.353553,
    -0.353553,
    -1.06066,
    -0.353553,
    -1.06066,
    -1.06066,
    -0.353553,
    0.707107,
    -1.414214,
    0.707107,
    0.0,
    0.707107,
    0.0,
    0.707107,
    1.414214,
]
