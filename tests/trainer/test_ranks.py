"""Real processes over gloo, started by torchrun: 1, 2 and 4 ranks end with the same bank, sharded or killed or not."""

import os
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
FOUR = ["plain", "streamed", "wrapped around", "resumed"]
SHARDED = ["sharded", "sharded, all weights", "sharded, streamed", "sharded in one group, evaluated"]
LOADED = ["loaded in pieces"]
SAVED = ["sharded, saved", "sharded, resumed"]
REFUSED = ["sharded, failing", "sharded, everything"]


def launch(count: int, folder: Path, names: list[str], dies: bool = False) -> str:
    """Both streams of a torchrun, which went well or died at the end of its names."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m",
         "tests.helpers.ranks", str(folder), *names],
        env=environment, capture_output=True, text=True, timeout=280, cwd=ROOT,
    )  # fmt: skip
    assert "SIGKILL" in done.stderr if dies else done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Any]]:
    """What came out of the run of a name on so many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    said = {
        2: launch(2, folder, [*TWO, "killed"], dies=True),
        4: launch(4, folder, [*FOUR, "killed again"], dies=True),
    }
    launch(2, folder, [*SHARDED, *SAVED, *LOADED, *REFUSED, "revived"])

    def look_up(name: str, count: int) -> dict[str, Any]:
        path = folder / f"{name}-{count}.pt"
        if count == 1 and not path.exists():
            ranks.main(folder, [name])
        return torch.load(path) | {"said": said.get(count, "")}

    return look_up


def near(one: Tensor, other: Tensor) -> None:
    """The issue asks for 1e-4; in float64 and stored in float32, the order of sums is all that differs."""
    agree(one, other, 1e-6)


@pytest.mark.parametrize(
    ("name", "count", "alone"),
    [(name, 2, name) for name in TWO if name not in ("dispatched", "saved", "failing")]
    + [("dispatched", 2, "plain"), ("plain", 4, "plain"), ("streamed", 4, "streamed")],
)
def test_ranks_end_with_the_same_bank(found: Any, name: str, count: int, alone: str) -> None:
    many, one = found(name, count), found(alone, 1)
    near(many["weights"], one["weights"])
    assert many["rows"] == one["rows"]
    assert many["unit"] < 1e-6
    near(many["scores"], one["scores"])
    near(many["sources"], one["sources"])


def test_clipping_is_measured_on_every_rank_alike(found: Any) -> None:
    one, two = found("clipped", 1)["clips"], found("clipped", 2)["clips"]
    assert two == pytest.approx(one, rel=1e-6)
    assert max(two) < 1


def test_rows_that_were_wrapped_around_count_as_often_as_they_were_trained_on(found: Any) -> None:
    """26 rows in batches of four over four ranks: the last step repeats the first two, and trains on them."""
    four, one = found("wrapped around", 4), found("wrapped around", 1)
    assert one["visits"] == 3 * 26
    assert four["visits"] == 3 * 28
    assert four["unit"] < 1e-6
    near(four["alone"], four["scores"])


def test_a_run_goes_on_with_another_number_of_ranks(found: Any) -> None:
    """Two ranks stop at step 5 of 18; four ranks, and then one, go on from there."""
    expected = found("plain", 1)
    near(found("saved", 2)["scores"], expected["scores"])
    for count in (4, 1):
        resumed = found("resumed", count)
        assert resumed["rows"] == expected["rows"]
        near(resumed["scores"], expected["scores"])


def test_what_fails_on_one_rank_fails_on_all_and_is_said_once(found: Any) -> None:
    result = found("failing", 2)
    first, second = result["errors"]
    assert first.startswith("rank 1 failed in the passes")
    assert second == "this row's gradient"
    assert result["said"].count("its response bank could not be made") == 1


@pytest.mark.parametrize("count", [2, 1])
def test_a_run_goes_on_after_kills(found: Any, count: int) -> None:
    """Two ranks are killed in step 9; four go on from step 5, and one is killed in step 14; two, or one, end it."""
    result, expected = found("revived", count), found("plain", 1)
    assert result["rows"] == expected["rows"]
    near(result["scores"], expected["scores"])


@pytest.mark.parametrize(
    ("name", "alone"),
    [(name, name) for name in SHARDED] + [(name, "plain") for name in (*SAVED, *LOADED)],
)
def test_weights_sharded_by_fsdp_end_with_the_same_bank(found: Any, name: str, alone: str) -> None:
    many, one = found(name, 2), found(alone, 1)
    assert many["sharded"]
    assert not one["sharded"]
    near(many["weights"], one["weights"])
    assert many["rows"] == one["rows"]
    near(many["scores"], one["scores"])
    near(many["sources"], one["sources"])
    near(many["alone"], one["scores"])


def test_sharded_passes_that_fail_are_finished_in_one_process(found: Any) -> None:
    """What one rank cannot read is an error on both, and nobody waits; the record is enough for the bank."""
    result = found("sharded, failing", 2)
    assert result["errors"] == ["rank 1: these rows", "these rows"]
    near(result["scores"], found("plain", 1)["scores"])
    assert "sharded over ranks, where no query is read" in result["live"]


def test_sharded_weights_that_hooks_cannot_serve_are_refused(found: Any) -> None:
    (said,) = found("sharded, everything", 2)["errors"]
    assert "is sharded by FSDP and no Linear layer's own weight" in said
    assert "parameters='linear'" in said
