"""Metrics of scores, held against slow definitions, scipy and examples by hand."""

import math

import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor

from hf_fwdattr.evaluation.designs import without_random, without_top
from hf_fwdattr.evaluation.metrics import brittleness, lds, mislabelled_auc, noise_ceiling, recall, removal
from tests.helpers.reference import agree


def world(queries: int = 6, rows: int = 20, subsets: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(queries, rows, generator=generator, dtype=torch.float64)
    kept = torch.rand(subsets, rows, generator=generator) < 0.5
    noise = torch.randn(subsets, queries, generator=generator, dtype=torch.float64)
    return scores, kept, -(kept.double() @ scores.T) + 2 * noise  # losses fall where helpful rows are kept


def test_lds_of_an_example_computed_by_hand() -> None:
    """Predicted 3, 5, 6. Losses 3, 1, 2 put the outcomes in the order 1, 3, 2: rho = 1 - 6 * (0+1+1) / (3 * 8)."""
    scores = torch.tensor([[1.0, 2.0, 4.0]])
    kept = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
    assert lds(scores, kept, torch.tensor([[3.0], [1.0], [2.0]])).mean == pytest.approx(0.5)
    assert lds(scores, kept, torch.tensor([[3.0], [2.0], [1.0]])).mean == pytest.approx(1.0)
    assert lds(scores, kept, torch.tensor([[1.0], [2.0], [3.0]])).mean == pytest.approx(-1.0)


def test_lds_is_the_mean_of_scipys_rank_correlations() -> None:
    scores, kept, losses = world()
    expected = [spearmanr(kept.double() @ scores[q], -losses[:, q]).statistic for q in range(6)]
    result = lds(scores, kept, losses)
    agree(result.per_query, torch.tensor(expected, dtype=torch.float64), 1e-12)
    assert result.mean == pytest.approx(sum(expected) / 6)
    assert 0.5 < result.mean < 1
    assert result.low < result.mean < result.high
    assert (result.low, result.high) == (lds(scores, kept, losses).low, lds(scores, kept, losses).high)


def test_lds_of_the_wrong_sign_is_negative() -> None:
    scores, kept, losses = world()
    assert lds(-scores, kept, losses).mean == pytest.approx(-lds(scores, kept, losses).mean)


def test_lds_depends_on_the_order_only() -> None:
    scores, kept, losses = world()
    agree(lds(5 * scores, kept, losses.exp()).per_query, lds(scores, kept, losses).per_query, 1e-12)


@pytest.mark.parametrize(
    "swap",
    [lambda s, k, o: (s.T, k, o), lambda s, k, o: (s, k.T, o), lambda s, k, o: (s, k, o.T)],
    ids=["scores", "subsets", "outcomes"],
)
def test_lds_refuses_swapped_axes(swap) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"outcomes must be \(subsets, queries\)"):
        lds(*swap(*world()))


def test_lds_refuses_scores_of_other_rows() -> None:
    scores, kept, losses = world()
    with pytest.raises(ValueError, match="do not fit"):
        lds(scores[:, 1:], kept, losses)


@pytest.mark.parametrize("which", ["scores", "outcomes"])
def test_lds_refuses_values_that_are_not_finite(which: str) -> None:
    scores, kept, losses = world()
    (scores if which == "scores" else losses)[2, 3] = torch.nan
    with pytest.raises(ValueError, match=f"{which} hold"):
        lds(scores, kept, losses)


def test_lds_of_constant_scores_is_zero() -> None:
    scores, kept, losses = world()
    scores[1] = 0.0
    result = lds(scores, kept, losses)
    assert result.per_query[1] == 0.0
    assert result.per_query[0] != 0.0


def test_noise_ceiling_of_identical_retrainings_is_one() -> None:
    _, _, losses = world()
    assert noise_ceiling(losses.expand(3, -1, -1)).mean == pytest.approx(1.0)


def test_noise_ceiling_is_one_retraining_against_the_mean_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(3, 25, 4, generator=generator, dtype=torch.float64) + world(4, subsets=25)[2]
    expected = [
        spearmanr(losses[s, :, q], losses[[i for i in range(3) if i != s], :, q].mean(0)).statistic
        for s in range(3)
        for q in range(4)
    ]
    assert noise_ceiling(losses).mean == pytest.approx(sum(expected) / 12)


def test_noise_ceiling_needs_two_retrainings() -> None:
    with pytest.raises(ValueError, match="needs two"):
        noise_ceiling(world()[2][None])


SCORES = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
RELEVANT = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool()


def test_recall_of_an_example_computed_by_hand() -> None:
    """Query 0: relevant at ranks 2 and 4. Query 1: at rank 1."""
    result = recall(SCORES, RELEVANT, ks=(1, 2, 4))
    assert result.at[1].per_query.tolist() == [0.0, 1.0]
    assert result.at[2].per_query.tolist() == [0.5, 1.0]
    assert result.at[4].mean == 1.0
    assert result.hits[1].mean == 0.5
    assert result.hits[2].mean == 1.0
    assert result.mrr.mean == pytest.approx((1 / 2 + 1) / 2)


def test_recall_of_the_wrong_sign_is_low() -> None:
    result = recall(-SCORES, RELEVANT, ks=(1,))
    assert result.mrr.per_query.tolist() == [1.0, 0.25]


def test_recall_equals_the_slow_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 40, generator=generator).mul(4).round()  # with ties
    relevant = torch.rand(20, 40, generator=generator) < 0.1
    relevant[:, 0] = True
    result = recall(scores, relevant, ks=(3,))
    for query in range(20):
        order = sorted(range(40), key=lambda row: (-float(scores[query, row]), bool(relevant[query, row])))
        ranked = [bool(relevant[query, row]) for row in order]
        assert result.mrr.per_query[query] == pytest.approx(1 / (ranked.index(True) + 1))
        assert result.at[3].per_query[query] == pytest.approx(sum(ranked[:3]) / sum(ranked))


def test_recall_of_constant_scores_finds_nothing() -> None:
    result = recall(torch.zeros(1, 4), torch.tensor([[1, 0, 0, 0]]).bool(), ks=(1, 3))
    assert result.mrr.mean == 0.25
    assert result.hits[3].mean == 0.0


def test_recall_refuses_other_shapes_and_queries_without_relevant_rows() -> None:
    for bad in ((SCORES.T, RELEVANT), (SCORES, RELEVANT.float()), (SCORES[0], RELEVANT[0])):
        with pytest.raises(ValueError, match="must both be"):
            recall(*bad)
    with pytest.raises(ValueError, match=r"queries \[0\] have no relevant row"):
        recall(SCORES, RELEVANT & torch.tensor([[False], [True]]))
    with pytest.raises(ValueError, match="scores hold"):
        recall(SCORES / 0, RELEVANT)


def test_removal_of_an_example_computed_by_hand() -> None:
    """Losses 3 and 5 on the diagonal over 1 and 2: +2 and +3. Random: means 1.5 and 2.5: +0.5 and +0.5."""
    result = removal(torch.tensor([[3.0, 99], [99, 5]]), torch.tensor([[1.0, 2], [2, 3]]), torch.tensor([1.0, 2.0]))
    assert result.top.per_query.tolist() == [2.0, 3.0]
    assert result.top.mean == 2.5
    assert result.random.per_query.tolist() == [0.5, 0.5]


def test_removal_refuses_swapped_axes_and_values_that_are_not_finite() -> None:
    top, random, base = torch.rand(3, 3), torch.rand(5, 3), torch.rand(3)
    for bad in ((top[:2], random, base), (top, random.T, base), (top, random, base[:2])):
        with pytest.raises(ValueError, match="must be"):
            removal(*bad)
    with pytest.raises(ValueError, match="random hold"):
        removal(top, random * torch.nan, base)


def test_removal_of_opponents_lowers_the_loss() -> None:
    """Linear training: the loss rises by the score of what is left out; the wrong sign makes it fall."""
    scores = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))

    def losses_after(kept: torch.Tensor) -> torch.Tensor:
        return (~kept).float() @ scores.T

    random = losses_after(without_random(30, 3, 8))
    right = removal(losses_after(without_top(scores, 3)), random, torch.zeros(4))
    wrong = removal(losses_after(without_top(-scores, 3)), random, torch.zeros(4))
    assert right.top.low > right.random.high
    assert wrong.top.high < 0


COUNTS = torch.tensor([1, 2, 5])


def test_brittleness_of_an_example_computed_by_hand() -> None:
    """Lost at once, lost with five, never lost; and lost with two though it came back with five."""
    answered = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    result = brittleness(answered, COUNTS)
    assert result.smallest.tolist() == [1, 5, math.inf, 2]
    assert result.lost.tolist() == [0.25, 0.5, 0.75]


def test_brittleness_equals_the_slow_definition() -> None:
    answered = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    result = brittleness(answered, COUNTS)
    for query in range(50):
        lost = [int(c) for c, still in zip(COUNTS, answered[:, query], strict=True) if not still]
        assert result.smallest[query] == (lost[0] if lost else math.inf)


def test_brittleness_of_negated_answers_is_higher() -> None:
    answered = torch.tensor([[1, 1], [0, 1], [0, 0]]).bool()
    assert brittleness(answered, COUNTS).lost.tolist() == [0, 0.5, 1]
    assert brittleness(~answered, COUNTS).lost.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [torch.ones(2, 3).bool(), torch.ones(3, 2)], ids=["axes", "losses"])
def test_brittleness_refuses_other_shapes_and_losses(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="booleans"):
        brittleness(bad, COUNTS)


def test_brittleness_needs_ascending_counts() -> None:
    for counts in (COUNTS.flip(0), torch.tensor([1, 2, 2])):
        with pytest.raises(ValueError, match="ascend"):
            brittleness(torch.ones(3, 2).bool(), counts)


def test_mislabelled_auc_of_an_example_computed_by_hand() -> None:
    """Mislabelled 3 and 1, right 2 and 0: of four pairs three in order. A tie counts half."""
    suspicion, flipped = torch.tensor([3.0, 1, 2, 0]), torch.tensor([1, 1, 0, 0]).bool()
    assert mislabelled_auc(suspicion, flipped) == pytest.approx(0.75)
    assert mislabelled_auc(torch.tensor([3.0, 2, 2, 0]), flipped) == pytest.approx(0.875)
    assert mislabelled_auc(torch.ones(4), flipped) == pytest.approx(0.5)


def test_mislabelled_auc_equals_scipy_and_the_slow_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    flipped = torch.rand(80, generator=generator) < 0.2
    suspicion = (torch.randn(80, generator=generator) + flipped).mul(3).round()  # with ties
    value = mislabelled_auc(suspicion, flipped)
    wrong, right = suspicion[flipped], suspicion[~flipped]
    assert value == pytest.approx(mannwhitneyu(wrong, right).statistic / (len(wrong) * len(right)))
    pairs = (wrong[:, None] > right).double() + 0.5 * (wrong[:, None] == right)
    assert value == pytest.approx(float(pairs.mean()))
    assert mislabelled_auc(-suspicion, flipped) == pytest.approx(1 - value)


def test_mislabelled_auc_refuses_other_shapes_and_rows_of_one_kind() -> None:
    suspicion, flipped = torch.rand(4), torch.tensor([1, 0, 0, 0]).bool()
    for bad in ((suspicion[None], flipped), (suspicion, flipped[:3]), (suspicion, flipped.float())):
        with pytest.raises(ValueError, match="must be"):
            mislabelled_auc(*bad)
    for all_alike in (torch.zeros(4).bool(), torch.ones(4).bool()):
        with pytest.raises(ValueError, match="both kinds"):
            mislabelled_auc(suspicion, all_alike)
    with pytest.raises(ValueError, match="suspicion hold"):
        mislabelled_auc(suspicion / 0, flipped)
