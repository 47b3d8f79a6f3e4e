import torch

from hf_fwdattr.evaluation.subsets import random_halves


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
