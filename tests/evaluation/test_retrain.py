from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.evaluation.subsets import random_halves


class Training:
    """Outcomes that tell subset and seed, and a count of how often it really ran; fails at run `fail_at`."""

    def __init__(self, fail_at: int = -1):
        self.runs, self.fail_at = 0, fail_at

    def __call__(self, subset: Tensor, seed: int) -> Tensor:
        if self.runs == self.fail_at:
            raise KeyboardInterrupt
        self.runs += 1
        return torch.stack([subset.double() @ torch.arange(8).double(), torch.tensor(seed + 1 / 3).double()])


HALVES = random_halves(8, 5)


def test_outcomes_lie_by_seed_subset_and_query(tmp_path: Path) -> None:
    train = Training()
    outcomes = retrain(train, HALVES, [7, 3], tmp_path, quiet=True)
    assert outcomes.shape == (2, 5, 2)
    assert outcomes.dtype == torch.float64
    assert train.runs == 10
    for index, seed in enumerate((7, 3)):
        for subset in range(5):
            assert torch.equal(outcomes[index, subset], Training()(HALVES[subset], seed))


def test_nothing_runs_twice(tmp_path: Path) -> None:
    first = retrain(Training(), HALVES, [0, 1], tmp_path, quiet=True)
    again = Training()
    assert torch.equal(retrain(again, HALVES, [0, 1], tmp_path, quiet=True), first)
    assert again.runs == 0


def test_what_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    killed = Training(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        retrain(killed, HALVES, [0], tmp_path, quiet=True)
    resumed = Training()
    outcomes = retrain(resumed, HALVES, [0], tmp_path, quiet=True)
    assert (killed.runs, resumed.runs) == (3, 2)
    assert torch.equal(outcomes, retrain(Training(), HALVES, [0], tmp_path / "afresh", quiet=True))
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".json"}


def test_more_subsets_and_seeds_only_add_runs(tmp_path: Path) -> None:
    retrain(Training(), HALVES[:2], [0], tmp_path, quiet=True)
    more = Training()
    retrain(more, HALVES, [0, 1], tmp_path, quiet=True)
    assert more.runs == 8


def test_weights_are_not_mistaken_for_subsets(tmp_path: Path) -> None:
    train = Training()
    for weights in (HALVES, HALVES.to(torch.uint8), HALVES.double()):
        retrain(train, weights, [0], tmp_path, quiet=True)
    assert train.runs == 15
