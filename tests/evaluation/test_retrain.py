import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_fwdattr.evaluation.retrain import identity, retrain
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
    outcomes = retrain(train, HALVES, [7, 3], tmp_path, quiet=True, name="t")
    assert outcomes.shape == (2, 5, 2)
    assert outcomes.dtype == torch.float64
    assert train.runs == 10
    for index, seed in enumerate((7, 3)):
        for subset in range(5):
            assert torch.equal(outcomes[index, subset], Training()(HALVES[subset], seed))


def test_nothing_runs_twice(tmp_path: Path) -> None:
    first = retrain(Training(), HALVES, [0, 1], tmp_path, quiet=True, name="t")
    again = Training()
    assert torch.equal(retrain(again, HALVES, [0, 1], tmp_path, quiet=True, name="t"), first)
    assert again.runs == 0


def test_what_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    killed = Training(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        retrain(killed, HALVES, [0], tmp_path, quiet=True, name="t")
    resumed = Training()
    outcomes = retrain(resumed, HALVES, [0], tmp_path, quiet=True, name="t")
    assert (killed.runs, resumed.runs) == (3, 2)
    assert torch.equal(outcomes, retrain(Training(), HALVES, [0], tmp_path / "afresh", quiet=True, name="t"))
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".json"}


def test_more_subsets_and_seeds_only_add_runs(tmp_path: Path) -> None:
    retrain(Training(), HALVES[:2], [0], tmp_path, quiet=True, name="t")
    more = Training()
    retrain(more, HALVES, [0, 1], tmp_path, quiet=True, name="t")
    assert more.runs == 8


def test_weights_are_not_mistaken_for_subsets(tmp_path: Path) -> None:
    train = Training()
    for weights in (HALVES, HALVES.to(torch.uint8), HALVES.double()):
        retrain(train, weights, [0], tmp_path, quiet=True, name="t")
    assert train.runs == 15


def _one(subset: Tensor, seed: int) -> Tensor:
    return subset.double().sum()[None] + seed


def _other(subset: Tensor, seed: int) -> Tensor:
    return subset.double().sum()[None] - seed


def test_another_train_in_the_same_folder_is_not_mistaken(tmp_path: Path) -> None:
    assert retrain(_one, HALVES, [5], tmp_path, quiet=True)[0, 0, 0] == 9
    assert retrain(_other, HALVES, [5], tmp_path, quiet=True)[0, 0, 0] == -1
    assert retrain(_one, HALVES, [5], tmp_path, quiet=True, name="again")[0, 0, 0] == 9
    assert len(list(tmp_path.iterdir())) == 15


def test_what_its_code_does_not_show_must_be_named(tmp_path: Path) -> None:
    shift = 3
    for train in (Training(), functools.partial(_one, seed=1), lambda subset, seed: subset.double()[:1] + shift):
        with pytest.raises(ValueError, match="say name="):
            retrain(train, HALVES, [0], tmp_path, quiet=True)
    assert identity(_one) != identity(_other)


def test_handfuls_give_what_single_runs_give(tmp_path: Path) -> None:
    calls = []

    def train(subsets: Tensor, seeds: list[int]) -> Tensor:
        calls.append(len(seeds))
        return torch.stack([_one(subset, seed) for subset, seed in zip(subsets, seeds, strict=True)])

    together = retrain(train, HALVES, [0, 1], tmp_path / "together", quiet=True, name="t", together=4)
    assert calls == [4, 4, 2]
    assert torch.equal(together, retrain(_one, HALVES, [0, 1], tmp_path / "alone", quiet=True))


def test_a_handful_that_lost_some_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 retrainings where 3"):
        retrain(lambda s, _: s[:1].double(), HALVES, [0], tmp_path, quiet=True, name="t", together=3)


def test_processes_side_by_side_give_the_same(tmp_path: Path) -> None:
    alone = retrain(_one, HALVES[:2], [0], tmp_path / "alone", quiet=True)
    assert torch.equal(retrain(_one, HALVES[:2], [0], tmp_path / "two", quiet=True, workers=2), alone)
