"""Designs: which rows each retraining keeps."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from hf_fwdattr.evaluation.designs import (
    random_halves,
    random_rows,
    without_random,
    without_rows,
    without_sources,
    without_top,
)


def test_random_halves_keep_half_of_the_rows() -> None:
    for rows in (10, 11):
        halves = random_halves(rows, 20)
        assert halves.dtype == torch.bool
        assert halves.shape == (20, rows)
        assert halves.sum(1).tolist() == [rows // 2] * 20
    assert len({tuple(line.tolist()) for line in random_halves(10, 20)}) > 15


def test_random_halves_keep_every_row_about_equally_often() -> None:
    share = random_halves(30, 2000).double().mean(0)
    assert float((share - 0.5).abs().max()) < 0.05


def test_more_random_halves_begin_with_the_fewer() -> None:
    assert torch.equal(random_halves(12, 9, seed=4)[:3], random_halves(12, 3, seed=4))
    assert not torch.equal(random_halves(12, 3, seed=4), random_halves(12, 3, seed=5))


def test_random_rows_are_distinct_and_more_begin_with_the_fewer() -> None:
    few, all_rows = random_rows(40, 5), random_rows(40, 100)
    assert torch.equal(all_rows[:5], few)
    assert sorted(all_rows.tolist()) == list(range(40))
    assert not torch.equal(random_rows(40, 5, seed=1), few)


def test_random_rows_are_not_those_of_the_first_batches() -> None:
    """A sampler with the same seed draws the same permutation, so all rows would be in the first batches."""
    for seed in (0, 1, 42):
        first = list(SeedableRandomSampler(torch.zeros(400), data_seed=seed))[:40]
        drawn = random_rows(400, 40, seed).tolist()
        assert len(set(first) & set(drawn)) < 15
        assert torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:40].tolist() == first


def test_without_rows_has_one_zero_per_line() -> None:
    weights = without_rows(4, torch.tensor([2, 0]))
    assert weights.tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]
    assert weights.dtype == torch.float32


def test_without_sources_zeroes_all_rows_of_a_source() -> None:
    row_sources = torch.tensor([0, 1, 0, -1])
    assert without_sources(row_sources, torch.tensor([1, 0])).tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1]]


def test_without_top_leaves_out_the_highest_scores() -> None:
    scores = torch.tensor([[3.0, 1, 2, -9], [0, 5, -1, 4]])
    assert without_top(scores, 1).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert without_top(scores, 2).tolist() == [[False, True, False, True], [True, False, True, False]]
    assert without_top(-scores, 1).tolist() == [[True, True, True, False], [True, True, False, True]]


def test_without_top_refuses_no_rows_and_all_rows() -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match="leave out at least one of 4"):
            without_top(torch.rand(2, 4), count)


def test_without_random_leaves_out_as_many_rows_by_seed() -> None:
    kept = without_random(50, 5, 40, seed=3)
    assert kept.sum(1).tolist() == [45] * 40
    assert torch.equal(kept, without_random(50, 5, 40, seed=3))
    assert not torch.equal(kept, without_random(50, 5, 40, seed=4))
    assert float((~kept).double().mean(0).max()) < 0.35
