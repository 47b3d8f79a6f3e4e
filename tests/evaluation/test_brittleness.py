import math

import pytest
import torch

from hf_fwdattr.evaluation.metrics import brittleness


COUNTS = torch.tensor([1, 2, 5])


def test_by_hand() -> None:
    """Lost at once, lost with five, never lost; and lost with two though it came back with five."""
    answered = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    result = brittleness(answered, COUNTS)
    assert result.smallest.tolist() == [1, 5, math.inf, 2]
    assert result.lost.tolist() == [0.25, 0.5, 0.75]


def test_it_is_the_slow_definition() -> None:
    answered = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    result = brittleness(answered, COUNTS)
    for query in range(50):
        lost = [int(c) for c, still in zip(COUNTS, answered[:, query], strict=True) if not still]
        assert result.smallest[query] == (lost[0] if lost else math.inf)


def test_answers_the_wrong_way_round_are_seen() -> None:
    answered = torch.tensor([[1, 1], [0, 1], [0, 0]]).bool()
    assert brittleness(answered, COUNTS).lost.tolist() == [0, 0.5, 1]
    assert brittleness(~answered, COUNTS).lost.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [torch.ones(2, 3).bool(), torch.ones(3, 2)], ids=["axes", "losses"])
def test_other_shapes_and_losses_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="booleans"):
        brittleness(bad, COUNTS)


def test_counts_must_ascend() -> None:
    for counts in (COUNTS.flip(0), torch.tensor([1, 2, 2])):
        with pytest.raises(ValueError, match="ascend"):
            brittleness(torch.ones(3, 2).bool(), counts)
