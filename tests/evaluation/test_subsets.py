import torch
from accelerate.data_loader import SeedableRandomSampler

from hf_fwdattr.evaluation.designs import random_halves, random_rows


def test_each_line_keeps_half_of_the_rows() -> None:
    for rows in (10, 11):
        halves = random_halves(rows, 20)
        assert halves.dtype == torch.bool
        assert halves.shape == (20, rows)
        assert halves.sum(1).tolist() == [rows // 2] * 20
    assert len({tuple(line.tolist()) for line in random_halves(10, 20)}) > 15


def test_every_row_is_kept_about_half_of_the_time() -> None:
    share = random_halves(30, 2000).double().mean(0)
    assert float((share - 0.5).abs().max()) < 0.05


def test_more_halves_begin_with_the_fewer() -> None:
    assert torch.equal(random_halves(12, 9, seed=4)[:3], random_halves(12, 3, seed=4))
    assert not torch.equal(random_halves(12, 3, seed=4), random_halves(12, 3, seed=5))


def test_rows_to_leave_out_are_different_ones_and_more_begin_with_the_fewer() -> None:
    few, all_of_them = random_rows(40, 5), random_rows(40, 100)
    assert torch.equal(all_of_them[:5], few)
    assert sorted(all_of_them.tolist()) == list(range(40))
    assert not torch.equal(random_rows(40, 5, seed=1), few)


def test_rows_to_leave_out_are_not_those_that_training_saw_first() -> None:
    """A sampler with the same seed draws the same permutation: all of them would come in the first batches."""
    for seed in (0, 1, 42):
        first = list(SeedableRandomSampler(torch.zeros(400), data_seed=seed))[:40]
        drawn = random_rows(400, 40, seed).tolist()
        assert len(set(first) & set(drawn)) < 15
        assert torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:40].tolist() == first
