import pytest
import torch

from hf_fwdattr.evaluation.metrics import recall


SCORES = torch.tensor([[9.0, 8, 7, 6], [1, 2, 3, 4]])
TEACHERS = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]).bool()


def test_by_hand() -> None:
    """Query 0: teachers at ranks 2 and 4. Query 1: at rank 1."""
    result = recall(SCORES, TEACHERS, ks=(1, 2, 4))
    assert result.at[1].per_query.tolist() == [0.0, 1.0]
    assert result.at[2].per_query.tolist() == [0.5, 1.0]
    assert result.at[4].mean == 1.0
    assert result.hits[1].mean == 0.5
    assert result.hits[2].mean == 1.0
    assert result.mrr.mean == pytest.approx((1 / 2 + 1) / 2)


def test_the_wrong_sign_is_seen() -> None:
    result = recall(-SCORES, TEACHERS, ks=(1,))
    assert result.mrr.per_query.tolist() == [1.0, 0.25]


def test_it_is_the_slow_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 40, generator=generator).mul(4).round()  # with ties
    teachers = torch.rand(20, 40, generator=generator) < 0.1
    teachers[:, 0] = True
    result = recall(scores, teachers, ks=(3,))
    for query in range(20):
        order = sorted(range(40), key=lambda row: (-float(scores[query, row]), bool(teachers[query, row])))
        found = [bool(teachers[query, row]) for row in order]
        assert result.mrr.per_query[query] == pytest.approx(1 / (found.index(True) + 1))
        assert result.at[3].per_query[query] == pytest.approx(sum(found[:3]) / sum(found))


def test_who_says_nothing_finds_nothing() -> None:
    result = recall(torch.zeros(1, 4), torch.tensor([[1, 0, 0, 0]]).bool(), ks=(1, 3))
    assert result.mrr.mean == 0.25
    assert result.hits[3].mean == 0.0


def test_what_cannot_be_is_refused() -> None:
    for bad in ((SCORES.T, TEACHERS), (SCORES, TEACHERS.float()), (SCORES[0], TEACHERS[0])):
        with pytest.raises(ValueError, match="must both be"):
            recall(*bad)
    with pytest.raises(ValueError, match=r"queries \[0\] have no teacher"):
        recall(SCORES, TEACHERS & torch.tensor([[False], [True]]))
    with pytest.raises(ValueError, match="scores hold"):
        recall(SCORES / 0, TEACHERS)
