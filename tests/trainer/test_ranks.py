"""Real processes over gloo: 1, 2 and 4 ranks end with the same bank, sharded or killed or not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import ranks
from tests.helpers.reference import agree


ROOT = Path(__file__).parents[2]
TWO = ["plain", "dispatched", "clipped", "smoothed labels", "parameter groups", "streamed", "saved", "failing"]
TWO_REFUSED = ["refused by one"]
FOUR = ["plain", "streamed", "wrapped around", "resumed"]
SHARDED = ["sharded", "sharded, after", "sharded, all weights", "sharded, streamed", "sharded in one group, evaluated"]
LOADED = ["loaded in pieces"]
SAVED = ["sharded, saved", "sharded, resumed"]
REFUSED = ["sharded, failing", "sharded, everything"]


GROUPS = [
    (2, [*TWO_REFUSED, *TWO, "killed"]),
    (4, [*FOUR, "killed again"]),
    (2, [*SHARDED, *SAVED, *LOADED, *REFUSED, "revived"]),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Any]]:
    """Return the results of a named run on so many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.forked_ranks", str(folder), json.dumps(GROUPS)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, cwd=ROOT,
    )  # fmt: skip
    output = [(folder / f"group-{number}.txt").read_text() for number in range(len(GROUPS))]
    kill = str(-signal.SIGKILL)
    assert done.stdout.split() == [kill, kill, "0"], done.stderr + "".join(text[-3000:] for text in output)

    def look_up(name: str, count: int) -> dict[str, Any]:
        path = folder / f"{name}-{count}.pt"
        if count == 1 and not path.exists():
            ranks.main(folder, [name])
        return torch.load(path) | {"output": output[0]}

    return look_up


def near(one: Tensor, other: Tensor) -> None:
    """In float64, stored in float32, only the order of sums differs."""
    agree(one, other, 1e-6)


@pytest.mark.parametrize(
    ("name", "count", "alone"),
    [(name, 2, name) for name in TWO if name not in ("dispatched", "saved", "failing")]
    + [("dispatched", 2, "plain"), ("plain", 4, "plain"), ("streamed", 4, "streamed")],
)
def test_any_number_of_ranks_gives_the_same_bank(results: Any, name: str, count: int, alone: str) -> None:
    many, one = results(name, count), results(alone, 1)
    near(many["weights"], one["weights"])
    assert many["rows"] == one["rows"]
    assert many["unit"] < 1e-6
    near(many["scores"], one["scores"])
    near(many["sources"], one["sources"])


def test_clipping_factor_is_the_same_on_every_rank(results: Any) -> None:
    one, two = results("clipped", 1)["clips"], results("clipped", 2)["clips"]
    assert two == pytest.approx(one, rel=1e-6)
    assert max(two) < 1


def test_wrapped_around_rows_count_as_often_as_they_are_trained_on(results: Any) -> None:
    """26 rows in batches of four over four ranks: the last step repeats the first two, and trains on them."""
    four, one = results("wrapped around", 4), results("wrapped around", 1)
    assert one["visits"] == 3 * 26
    assert four["visits"] == 3 * 28
    assert four["unit"] < 1e-6
    near(four["rebuilt"], four["scores"])


def test_run_may_be_resumed_with_another_number_of_ranks(results: Any) -> None:
    """Two ranks stop at step 5 of 18; four ranks, and then one, go on from there."""
    expected = results("plain, after", 1)
    near(results("saved", 2)["scores"], expected["scores"])
    for count in (4, 1):
        resumed = results("resumed", count)
        assert resumed["rows"] == expected["rows"]
        near(resumed["scores"], expected["scores"])


def test_refusal_by_one_rank_is_raised_on_all_before_the_first_step(results: Any) -> None:
    first, second = results("refused by one", 2)["errors"]
    assert second.startswith(
        "per-row gradients of PeftModel: a batch of 4 rows fails with ValueError: this row's grad"
    )
    assert first == f"rank 1: {second}"


def test_failure_of_one_rank_is_raised_on_all_and_logged_once(results: Any) -> None:
    result = results("failing", 2)
    first, second = result["errors"]
    assert first.startswith("rank 1 failed in the passes")
    assert second == "this row's gradient"
    assert result["output"].count("its response bank could not be made") == 1


def test_run_may_be_resumed_after_kills(results: Any) -> None:
    """Two ranks are killed in step 9; four go on from step 5, and one is killed in step 14; two end it."""
    result, expected = results("revived", 2), results("plain", 1)
    assert result["rows"] == expected["rows"]
    near(result["scores"], expected["scores"])


@pytest.mark.parametrize(
    ("name", "alone"),
    [(name, name) for name in SHARDED]
    + [(name, "plain, after") for name in SAVED]
    + [(name, "plain") for name in LOADED],
)
def test_sharded_weights_give_the_same_bank(results: Any, name: str, alone: str) -> None:
    many, one = results(name, 2), results(alone, 1)
    assert many["sharded"]
    assert not one["sharded"]
    near(many["weights"], one["weights"])
    assert many["rows"] == one["rows"]
    near(many["scores"], one["scores"])
    near(many["sources"], one["sources"])
    near(many["rebuilt"], one["scores"])


def test_failed_sharded_passes_are_completed_in_one_process(results: Any) -> None:
    """A row that one rank cannot read is an error on both, and none waits; the record is enough for the bank."""
    result = results("sharded, failing", 2)
    assert result["errors"] == ["rank 1: these rows", "these rows"]
    near(result["scores"], results("plain", 1)["scores"])
    assert "is sharded over processes, where no query is read" in result["live"]


def test_sharded_weights_outside_linear_layers_are_refused(results: Any) -> None:
    message, same = results("sharded, everything", 2)["errors"]
    assert message == same
    assert "is sharded by FSDP and not the weight of one Linear layer" in message
    assert "parameters='linear'" in message
