import math

import pytest
import torch
from torch import Tensor

from hf_fwdattr.errors import NumericalError
from hf_fwdattr.response import curvature as curvature_module
from hf_fwdattr.response.curvature import Curvature, ledoit_wolf
from hf_fwdattr.response.horizon import ExplicitHorizon, Horizon, NaturalHorizon
from tests.helpers.reference import agree, function_of


SIZE = 8


def factors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, SIZE, generator=generator, dtype=torch.float64)
    return {
        "fewer samples than parameters": wide,
        "more samples than parameters": torch.randn(20, SIZE, generator=generator, dtype=torch.float64),
        "repeated samples": torch.cat([wide, wide, 2 * wide[:1]]),
        "one sample": wide[:1],
        "samples of zero": torch.cat([wide, torch.zeros(3, SIZE, dtype=torch.float64)]),
        "only zeros": torch.zeros(3, SIZE, dtype=torch.float64),
        "no samples": torch.zeros(0, SIZE, dtype=torch.float64),
    }


HORIZONS = {
    "natural": NaturalHorizon(0.7),
    "explicit": ExplicitHorizon(9, 0.01, 0.2),
    "damped inverse": ExplicitHorizon(math.inf, 1.0, 0.2),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("horizon", HORIZONS.values(), ids=HORIZONS)
@pytest.mark.parametrize("factor", factors().values(), ids=factors())
def test_curvature_functions_equal_those_of_the_dense_matrix(
    factor: Tensor, horizon: Horizon, weight_decay: float
) -> None:
    dense = factor.T @ factor + weight_decay * torch.eye(SIZE, dtype=torch.float64)
    vectors = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    curvature = Curvature(factor, weight_decay)
    agree(curvature.apply(horizon.push, vectors), vectors @ function_of(dense, horizon.push), 1e-8)
    if not math.isinf(horizon.length):
        agree(curvature.apply(horizon.decay, vectors), vectors @ function_of(dense, horizon.decay), 1e-8)


def test_float32_curvature_keeps_its_digits() -> None:
    factor = factors()["repeated samples"]
    vectors = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = Curvature(factor, 0.1).apply(NaturalHorizon(5.0).push, vectors)
    single = Curvature(factor.float(), 0.1).apply(NaturalHorizon(5.0).push, vectors.float())
    assert single.dtype == torch.float32
    agree(single, exact, 1e-5)


def test_vectors_orthogonal_to_all_samples_stay_plain() -> None:
    factor = torch.zeros(2, SIZE, dtype=torch.float64)
    factor[:, :2] = torch.rand(2, 2).double() + 1
    unseen = torch.eye(SIZE, dtype=torch.float64)[5:]
    agree(Curvature(factor).apply(NaturalHorizon(0.7).push, unseen), 0.7 * unseen, 1e-12)


def test_column_blocks_do_not_change_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = factors()["more samples than parameters"]
    vectors = torch.rand(2, SIZE).double()
    whole = Curvature(factor).apply(NaturalHorizon(1.0).push, vectors)
    monkeypatch.setattr(curvature_module, "_WIDTH", 3)
    agree(Curvature(factor).apply(NaturalHorizon(1.0).push, vectors), whole, 1e-12)


def test_infinite_samples_are_refused() -> None:
    factor = factors()["one sample"]
    factor[0, 3] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        Curvature(factor)


def test_shrinkage_equals_the_dense_ledoit_wolf_formula() -> None:
    factor = factors()["fewer samples than parameters"]
    samples, dense = len(factor), factor.T @ factor
    spread = sum((samples * torch.outer(z, z) - dense).square().sum() for z in factor) / samples**2
    mean = dense.trace() / SIZE * torch.eye(SIZE, dtype=torch.float64)
    expected = float(spread / (dense - mean).square().sum())
    agree(torch.tensor(ledoit_wolf(factor @ factor.T, SIZE)), torch.tensor(min(expected, 1.0)), 1e-6)


def test_shrinkage_brings_curvature_closer_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = torch.diag(torch.logspace(0, -3, 40, dtype=torch.float64))
    improved = 0
    for _ in range(20):
        samples = torch.randn(12, 40, generator=generator, dtype=torch.float64) @ truth.sqrt() / 12**0.5
        shrunk = Curvature(samples, sampled=True)
        assert 0.0 < shrunk.shrinkage < 1.0
        eye = torch.eye(40, dtype=torch.float64)
        estimate = shrunk.apply(lambda sigma: sigma, eye)
        improved += bool((estimate - truth).norm() < (samples.T @ samples - truth).norm())
    assert improved >= 19


def test_shrinkage_needs_two_samples() -> None:
    assert ledoit_wolf(torch.ones(1, 1, dtype=torch.float64), SIZE) == 0.0
    assert ledoit_wolf(torch.zeros(0, 0, dtype=torch.float64), SIZE) == 0.0
