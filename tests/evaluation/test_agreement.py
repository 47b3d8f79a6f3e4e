"""Agreement of predicted with measured changes, held against scipy and examples by hand."""

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from hf_fwdattr.evaluation.agreement import Interval, agreement, loo, sum_over_sources
from tests.helpers.reference import agree


def world() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores (6, 20), rows left out (9,), losses (10, 6) (0.8 of the scores plus noise), and the noise."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    left_out = torch.tensor([3, 0, 19, 7, 8, 11, 2, 5, 13])
    noise = 0.3 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    base = torch.rand(6, generator=generator, dtype=torch.float64)
    return scores, left_out, torch.cat([base[None], base + 0.8 * scores[:, left_out].T + noise]), noise


def test_agreement_of_an_example_computed_by_hand() -> None:
    """Query 0: predicted 1, 2, 4, measured 1, 3, 2: rho = 1 - 6 * (0+1+1)/24 = .5. Query 1 in reverse order: -1.

    Through the origin: sum of products 1 + 6 + 8 + 3 + 4 + 3 = 25 over sum of squares 21 + 14 = 35.
    """
    result = agreement(torch.tensor([[1.0, 2, 4], [1, 2, 3]]), torch.tensor([[1.0, 3, 2], [3, 2, 1]]))
    assert result.spearman.per_query.tolist() == pytest.approx([0.5, -1.0])
    assert result.spearman.mean == pytest.approx(-0.25)
    assert result.slope == pytest.approx(25 / 35)
    assert result.cosine == pytest.approx(25 / (35 * 28) ** 0.5)
    # Means 13/6 and 2: covariance 25 - 6 * 13/6 * 2 = -1, variances 35 - 169/6 and 28 - 24.
    assert result.pearson == pytest.approx(-1 / ((35 - 169 / 6) * 4) ** 0.5)


def test_correlations_equal_those_of_scipy() -> None:
    scores, left_out, losses, _ = world()
    result = loo(scores, left_out, losses)
    measured = (losses[1:] - losses[0]).T
    expected = [spearmanr(scores[q, left_out], measured[q]).statistic for q in range(6)]
    agree(result.spearman.per_query, torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert result.pearson == pytest.approx(pearsonr(scores[:, left_out].flatten(), measured.flatten()).statistic)
    assert 0.6 < result.slope < 1
    assert result.summary()["slope"] == pytest.approx(result.slope, abs=1e-4)
    assert result.spearman.low < result.spearman.mean < result.spearman.high


def test_summary_names_each_number() -> None:
    scores, left_out, losses, _ = world()
    losses[1:] += 1.0  # a common shift, so that no two figures are alike
    result = loo(scores, left_out, losses)
    expected = {
        "spearman": result.spearman.mean, "spearman_low": result.spearman.low, "spearman_high": result.spearman.high,
        "pearson": result.pearson, "cosine": result.cosine, "slope": result.slope,
    }  # fmt: skip
    assert result.summary() == pytest.approx(expected, abs=6e-5)
    assert len({round(value, 3) for value in expected.values()}) == 6
    assert torch.equal(result.predicted, scores[:, left_out])
    assert torch.equal(result.measured, (losses[1:] - losses[0]).T)


def test_perfect_prediction_has_slope_one() -> None:
    scores, left_out, losses, noise = world()
    losses[1:] -= noise
    result = loo(0.8 * scores, left_out, losses)
    assert (result.spearman.mean, result.pearson, result.slope) == pytest.approx((1.0, 1.0, 1.0))
    assert loo(0.4 * scores, left_out, losses).slope == pytest.approx(2.0)  # half of the measured changes


def test_wrong_sign_negates_every_measure() -> None:
    scores, left_out, losses, _ = world()
    right, wrong = loo(scores, left_out, losses), loo(-scores, left_out, losses)
    for name in ("pearson", "cosine", "slope"):
        assert getattr(wrong, name) == pytest.approx(-getattr(right, name))
    assert wrong.spearman.mean == pytest.approx(-right.spearman.mean)


def test_common_shift_raises_cosine_and_not_pearson() -> None:
    predicted, measured = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 10, 10]])
    result = agreement(predicted, measured)
    assert (result.spearman.mean, result.pearson) == (0.0, 0.0)
    assert result.cosine == pytest.approx(6 / (3 * 14) ** 0.5)
    assert agreement(0 * predicted, measured).slope == 0.0


def test_agreement_refuses_swapped_axes() -> None:
    scores, left_out, losses, _ = world()
    for bad in ((scores.T, left_out, losses), (scores, left_out, losses.T), (scores, left_out[1:], losses)):
        with pytest.raises(ValueError, match="left out, queries"):
            loo(*bad)
    with pytest.raises(ValueError, match=r"\(queries, left out\)"):
        agreement(scores, scores.T)


def test_swapped_axes_of_equal_length_have_no_agreement() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(30, 30, generator=generator)
    losses = torch.cat([torch.zeros(1, 30), scores.T])
    assert loo(scores, torch.arange(30), losses).spearman.mean == pytest.approx(1.0)
    swapped = torch.cat([losses[:1], losses[1:].T])
    assert abs(loo(scores, torch.arange(30), swapped).spearman.mean) < 0.2


def test_loo_refuses_unknown_rows_and_values_that_are_not_finite() -> None:
    scores, left_out, losses, _ = world()
    for bad in (left_out - 1, left_out + 1):  # -1 and 20 are among them
        with pytest.raises(ValueError, match="beyond the 20"):
            loo(scores, bad, losses)
    losses[3, 2] = torch.nan
    with pytest.raises(ValueError, match="measured hold"):
        loo(scores, left_out, losses)


def test_score_of_a_source_is_the_sum_over_its_rows() -> None:
    scores = torch.tensor([[1.0, 2, 4, 8], [1, 1, 1, 1]])
    row_sources = torch.tensor([0, 1, 0, -1])
    assert sum_over_sources(scores, row_sources, 3).tolist() == [[5, 2, 0], [2, 1, 0]]
    with pytest.raises(ValueError, match="row_sources"):
        sum_over_sources(scores.T, row_sources, 3)


def test_scores_of_sources_are_compared_as_those_of_rows() -> None:
    scores, _, _, _ = world()
    row_sources = torch.arange(20) % 4
    per_source = sum_over_sources(scores, row_sources, 4)
    losses = torch.cat([torch.ones(1, 6, dtype=torch.float64), 1 + per_source[:, [2, 0]].T])
    result = loo(per_source, torch.tensor([2, 0]), losses)
    assert (result.pearson, result.slope) == pytest.approx((1.0, 1.0))
    assert loo(-per_source, torch.tensor([2, 0]), losses).slope == pytest.approx(-1.0)


def test_interval_covers_95_percent_of_means() -> None:
    """For many values the bootstrap is the normal interval: 1.96 standard errors on either side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3.0
    interval = Interval.of(values)
    error = float(values.std()) / 20
    assert interval.mean == pytest.approx(float(values.mean()))
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.15 * error)


def test_interval_of_equal_values_has_no_width() -> None:
    for values in (torch.tensor([2.0]), torch.tensor([2.0, 2.0, 2.0])):
        interval = Interval.of(values)
        assert (interval.low, interval.mean, interval.high) == (2.0, 2.0, 2.0)
