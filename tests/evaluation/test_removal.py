import pytest
import torch

from hf_fwdattr.evaluation.designs import without_random, without_top
from hf_fwdattr.evaluation.metrics import removal


def test_the_highest_scores_are_left_out() -> None:
    scores = torch.tensor([[3.0, 1, 2, -9], [0, 5, -1, 4]])
    assert without_top(scores, 1).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert without_top(scores, 2).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert without_top(-scores, 1).tolist() == [[True, True, True, False], [True, True, False, True]]


def test_none_or_all_is_refused() -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match="leave out at least one of 4"):
            without_top(torch.rand(2, 4), count)


def test_random_rows_are_as_many_and_others() -> None:
    kept = without_random(50, 5, 40, seed=3)
    assert kept.sum(1).tolist() == [45] * 40
    assert torch.equal(kept, without_random(50, 5, 40, seed=3))
    assert not torch.equal(kept, without_random(50, 5, 40, seed=4))
    assert float((~kept).double().mean(0).max()) < 0.35


def test_by_hand() -> None:
    """Own losses 3 and 5 over 1 and 2: +2 and +3. Random: means 1.5 and 2.5: +0.5 and +0.5."""
    result = removal(torch.tensor([[3.0, 99], [99, 5]]), torch.tensor([[1.0, 2], [2, 3]]), torch.tensor([1.0, 2.0]))
    assert result.top.per_query.tolist() == [2.0, 3.0]
    assert result.top.mean == 2.5
    assert result.random.per_query.tolist() == [0.5, 0.5]


def test_swapped_axes_and_missing_values_are_refused() -> None:
    own, random, base = torch.rand(3, 3), torch.rand(5, 3), torch.rand(3)
    for bad in ((own[:2], random, base), (own, random.T, base), (own, random, base[:2])):
        with pytest.raises(ValueError, match="must be"):
            removal(*bad)
    with pytest.raises(ValueError, match="random hold"):
        removal(own, random * torch.nan, base)


def test_opponents_first_is_seen() -> None:
    """Linear training: the loss rises by the score of what is left out; the wrong sign makes it fall."""
    scores = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))

    def retrained(kept: torch.Tensor) -> torch.Tensor:
        return (~kept).float() @ scores.T

    random = retrained(without_random(30, 3, 8))
    right = removal(retrained(without_top(scores, 3)), random, torch.zeros(4))
    wrong = removal(retrained(without_top(-scores, 3)), random, torch.zeros(4))
    assert right.top.low > right.random.high
    assert wrong.top.high < 0
