import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from hf_fwdattr.evaluation.metrics import lds, noise_ceiling
from tests.helpers.reference import agree


def world(queries: int = 6, rows: int = 20, subsets: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(queries, rows, generator=generator, dtype=torch.float64)
    kept = torch.rand(subsets, rows, generator=generator) < 0.5
    noise = torch.randn(subsets, queries, generator=generator, dtype=torch.float64)
    return scores, kept, -(kept.double() @ scores.T) + 2 * noise  # losses fall where helpful rows are kept


def test_by_hand() -> None:
    """Predicted 3, 5, 6. Losses 3, 1, 2 put the outcomes in the order 1, 3, 2: rho = 1 - 6 * (0+1+1) / (3 * 8)."""
    scores = torch.tensor([[1.0, 2.0, 4.0]])
    kept = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
    assert lds(scores, kept, torch.tensor([[3.0], [1.0], [2.0]])).mean == pytest.approx(0.5)
    assert lds(scores, kept, torch.tensor([[3.0], [2.0], [1.0]])).mean == pytest.approx(1.0)
    assert lds(scores, kept, torch.tensor([[1.0], [2.0], [3.0]])).mean == pytest.approx(-1.0)


def test_it_is_the_mean_of_scipys_rank_correlations() -> None:
    scores, kept, losses = world()
    expected = [spearmanr(kept.double() @ scores[q], -losses[:, q]).statistic for q in range(6)]
    result = lds(scores, kept, losses)
    agree(result.per_query, torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert result.mean == pytest.approx(sum(expected) / 6)
    assert 0.5 < result.mean < 1
    assert result.low < result.mean < result.high
    assert (result.low, result.high) == (lds(scores, kept, losses).low, lds(scores, kept, losses).high)


def test_the_wrong_sign_scores_below_zero() -> None:
    scores, kept, losses = world()
    assert lds(-scores, kept, losses).mean == pytest.approx(-lds(scores, kept, losses).mean)


def test_only_the_order_counts() -> None:
    scores, kept, losses = world()
    agree(lds(5 * scores, kept, losses.exp()).per_query, lds(scores, kept, losses).per_query, 1e-12)


@pytest.mark.parametrize(
    "swap",
    [lambda s, k, o: (s.T, k, o), lambda s, k, o: (s, k.T, o), lambda s, k, o: (s, k, o.T)],
    ids=["scores", "subsets", "outcomes"],
)
def test_swapped_axes_are_refused(swap) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"outcomes must be \(subsets, queries\)"):
        lds(*swap(*world()))


def test_scores_of_other_rows_are_refused() -> None:
    scores, kept, losses = world()
    with pytest.raises(ValueError, match="do not fit"):
        lds(scores[:, 1:], kept, losses)


@pytest.mark.parametrize("which", ["scores", "outcomes"])
def test_values_that_are_not_finite_are_refused(which: str) -> None:
    scores, kept, losses = world()
    (scores if which == "scores" else losses)[2, 3] = torch.nan
    with pytest.raises(ValueError, match=f"{which} hold"):
        lds(scores, kept, losses)


def test_a_prediction_without_differences_counts_as_none() -> None:
    scores, kept, losses = world()
    scores[1] = 0.0
    result = lds(scores, kept, losses)
    assert result.per_query[1] == 0.0
    assert result.per_query[0] != 0.0


def test_identical_retrainings_leave_no_noise() -> None:
    _, _, losses = world()
    assert noise_ceiling(losses.expand(3, -1, -1)).mean == pytest.approx(1.0)


def test_the_ceiling_is_one_retraining_against_the_mean_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(3, 25, 4, generator=generator, dtype=torch.float64) + world(4, subsets=25)[2]
    expected = [
        spearmanr(losses[s, :, q], losses[[i for i in range(3) if i != s], :, q].mean(0)).statistic
        for s in range(3)
        for q in range(4)
    ]
    assert noise_ceiling(losses).mean == pytest.approx(sum(expected) / 12)


def test_one_retraining_has_no_ceiling() -> None:
    with pytest.raises(ValueError, match="needs two"):
        noise_ceiling(world()[2][None])
