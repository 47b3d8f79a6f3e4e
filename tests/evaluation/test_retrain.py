"""Retraining: resumable runs, identities of training functions, groups and worker processes."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hf_fwdattr.evaluation import retrain as module
from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.retrain import identity, retrain


class Training:
    """A training function with outcomes that identify subset and seed; counts its runs and fails at run `fail_at`."""

    def __init__(self, fail_at: int = -1):
        self.runs, self.fail_at = 0, fail_at

    def __call__(self, subset: Tensor, seed: int) -> Tensor:
        if self.runs == self.fail_at:
            raise KeyboardInterrupt
        self.runs += 1
        return torch.stack(
            [subset.double() @ torch.arange(8).double(), torch.tensor(seed + 1 / 3, dtype=torch.float64)]
        )


HALVES = random_halves(8, 5)


def test_outcomes_are_ordered_by_seed_subset_and_query(tmp_path: Path) -> None:
    train = Training()
    outcomes = retrain(train, HALVES, [7, 3], tmp_path, quiet=True, name="t")
    assert outcomes.shape == (2, 5, 2)
    assert outcomes.dtype == torch.float64
    assert train.runs == 10
    for index, seed in enumerate((7, 3)):
        for subset in range(5):
            assert torch.equal(outcomes[index, subset], Training()(HALVES[subset], seed))


def test_kept_runs_are_not_repeated(tmp_path: Path) -> None:
    first = retrain(Training(), HALVES, [0, 1], tmp_path, quiet=True, name="t")
    again = Training()
    assert torch.equal(retrain(again, HALVES, [0, 1], tmp_path, quiet=True, name="t"), first)
    assert again.runs == 0


def test_killed_retraining_resumes(tmp_path: Path) -> None:
    killed = Training(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        retrain(killed, HALVES, [0], tmp_path, quiet=True, name="t")
    resumed = Training()
    outcomes = retrain(resumed, HALVES, [0], tmp_path, quiet=True, name="t")
    assert (killed.runs, resumed.runs) == (3, 2)
    assert torch.equal(outcomes, retrain(Training(), HALVES, [0], tmp_path / "afresh", quiet=True, name="t"))
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".json"}


def test_half_written_outcome_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_text

    def half(path: Path, text: str) -> None:
        whole(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        retrain(Training(), HALVES, [0], tmp_path, quiet=True, name="t")
    monkeypatch.undo()
    resumed = Training()
    assert retrain(resumed, HALVES, [0], tmp_path, quiet=True, name="t").shape == (1, 5, 2)
    assert resumed.runs == 5


def test_weights_reach_the_training_unchanged(tmp_path: Path) -> None:
    weights = torch.tensor([[0.5, 2.0, 1.0], [1.5, 0.25, 0.0]])
    expected = weights.double().sum(1)[None, :, None]
    assert torch.equal(retrain(_one, weights, [0], tmp_path / "made" / "anew", quiet=True), expected)
    grouped = retrain(
        lambda s, _: s.double().sum(1, keepdim=True),
        weights,
        [0],
        tmp_path,
        quiet=True,
        name="t",
        group_size=2,
    )
    assert torch.equal(grouped, expected)


def test_progress_bar_starts_at_the_kept_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar:
        def __init__(self, **settings: object):
            self.settings = settings
            self.done: list[int] = []
            bars.append(self)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            self.done.append(count)

    monkeypatch.setattr(module, "tqdm", Bar)
    retrain(Training(), HALVES[:2], [0], tmp_path, "halves", name="t")
    train = Training()
    retrain(lambda s, seeds: torch.stack([*map(train, s, seeds)]), HALVES, [0, 1], tmp_path, name="t", group_size=3)
    retrain(Training(), HALVES, [0, 1], tmp_path, quiet=True, name="t")
    assert [bar.settings["total"] for bar in bars] == [2, 10, 10]
    assert [bar.settings["initial"] for bar in bars] == [0, 2, 10]
    assert [bar.done for bar in bars] == [[1, 1], [3, 3, 2], []]
    assert [bar.settings["disable"] for bar in bars] == [False, False, True]
    assert bars[0].settings["desc"] == "halves"


def test_more_subsets_and_seeds_only_add_runs(tmp_path: Path) -> None:
    retrain(Training(), HALVES[:2], [0], tmp_path, quiet=True, name="t")
    more = Training()
    retrain(more, HALVES, [0, 1], tmp_path, quiet=True, name="t")
    assert more.runs == 8


def test_weights_and_subsets_are_different_runs(tmp_path: Path) -> None:
    train = Training()
    for weights in (HALVES, HALVES.to(torch.uint8), HALVES.double()):
        retrain(train, weights, [0], tmp_path, quiet=True, name="t")
    assert train.runs == 15


def _one(subset: Tensor, seed: int) -> Tensor:
    return subset.double().sum()[None] + seed


def _other(subset: Tensor, seed: int) -> Tensor:
    return subset.double().sum()[None] - seed


def test_another_train_function_is_another_run(tmp_path: Path) -> None:
    assert retrain(_one, HALVES, [5], tmp_path, quiet=True)[0, 0, 0] == 9
    assert retrain(_other, HALVES, [5], tmp_path, quiet=True)[0, 0, 0] == -1
    assert retrain(_one, HALVES, [5], tmp_path, quiet=True, name="again")[0, 0, 0] == 9
    assert len(list(tmp_path.iterdir())) == 15


def test_closures_and_objects_need_a_name(tmp_path: Path) -> None:
    shift = 3
    for train in (Training(), functools.partial(_one, seed=1), lambda subset, seed: subset.double()[:1] + shift):
        with pytest.raises(ValueError, match="say name="):
            retrain(train, HALVES, [0], tmp_path, quiet=True)
    assert identity(_one) != identity(_other)
    assert identity(torch.no_grad()(_one)) == identity(_one)


def test_same_name_with_other_code_has_another_identity() -> None:
    def train(subset: Tensor, seed: int) -> Tensor:
        return subset.double()

    first = train

    def train(subset: Tensor, seed: int) -> Tensor:  # type: ignore[no-redef]
        return -subset.double()

    assert first.__qualname__ == train.__qualname__
    assert identity(first) != identity(train)


def test_code_without_source_is_identified_by_its_operations() -> None:
    """Functions typed into an interpreter differ by numbers, operations, names and inner functions."""
    bodies = ("s * 2", "s * 3", "s + 2", "s.sum()", "s.mean()", "(lambda x: x * 2)(s)", "(lambda x: x * 3)(s)")

    def made(body: str) -> str:
        names: dict[str, SimpleNamespace] = {}
        exec(f"def train(s, seed): return {body}", names)
        return identity(names["train"])  # type: ignore[arg-type]

    identities = [made(body) for body in bodies]
    assert len(set(identities)) == len(bodies)
    assert identities == [made(body) for body in bodies]


def test_groups_give_the_outcomes_of_single_runs(tmp_path: Path) -> None:
    calls = []

    def train(subsets: Tensor, seeds: list[int]) -> Tensor:
        calls.append(len(seeds))
        return torch.stack([_one(subset, seed) for subset, seed in zip(subsets, seeds, strict=True)])

    grouped = retrain(train, HALVES, [0, 1], tmp_path / "grouped", quiet=True, name="t", group_size=4)
    assert calls == [4, 4, 2]
    assert torch.equal(grouped, retrain(_one, HALVES, [0, 1], tmp_path / "alone", quiet=True))

    one = retrain(train, HALVES, [0, 1], tmp_path / "one", quiet=True, name="t", group_size=1)
    assert calls == [4, 4, 2] + [1] * 10
    assert torch.equal(one, grouped)


@pytest.mark.parametrize("given", [1, 4])
def test_group_with_a_wrong_number_of_outcomes_is_refused(tmp_path: Path, given: int) -> None:
    with pytest.raises(ValueError, match=f"{given} retrainings where 3"):
        retrain(lambda s, _: torch.ones(given, 2), HALVES[:3], [0], tmp_path, quiet=True, name="t", group_size=3)
    assert not list(tmp_path.iterdir())


PARENT: list[bool] = []  # empty in a process that is spawned and not forked


def _with_process(subset: Tensor, seed: int) -> Tensor:
    if seed == 1:
        raise ArithmeticError("no outcome")
    return torch.cat([_one(subset, seed), torch.tensor([os.getpid(), torch.get_num_threads(), len(PARENT)])])


def test_worker_processes_give_the_same_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are fresh processes of one thread; a failure in one is raised, and finished outcomes are kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("tests.evaluation.test_retrain.PARENT", [True])
    with pytest.raises(ArithmeticError, match="no outcome"):
        retrain(_with_process, HALVES[:2], [0, 1], tmp_path, quiet=True, workers=2)
    assert len(list(tmp_path.glob("*.json"))) == 2
    values, process, threads, parents = retrain(_with_process, HALVES[:2], [0], tmp_path, quiet=True, workers=2)[0].T
    assert torch.equal(values, retrain(_one, HALVES[:2], [0], tmp_path / "alone", quiet=True)[0, :, 0])
    assert os.getpid() not in process.tolist()
    assert threads.tolist() == [1, 1]
    assert parents.tolist() == [0, 0]
