"""kill -9 at every request of a push: the repository has the old bank or the new one, and uploads are kept."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from hf_fwdattr import ResponseBank
from tests.bank.test_bank import contents, is_seed, written
from tests.helpers.hub_server import HUB
from tests.helpers.hub_world import World


ROOT = Path(__file__).parents[2]
NAME = "me/adapter"


class Pusher:
    """A process whose children push; a child can be killed at one of its requests."""

    def __init__(self, cache: Path):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.killed_push", NAME], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        assert self._read_line() == "ready"

    def push(self, folder: Path, kill_at: int | None = None, answered: bool = False) -> str:
        """Return how a push ended; it is killed before a request takes effect, or after that and before the answer."""
        child: list[int] = []
        born, counting, seen = threading.Event(), threading.Lock(), [0]
        own = threading.local()  # each request has a thread, and several may be under way

        def fault(method: str, path: str) -> str | None:
            born.wait()
            with counting:
                seen[0] += 1
                own.number = seen[0]
                if answered or own.number != kill_at:
                    return None
                os.kill(child[0], signal.SIGKILL)
                return "drop"

        def done(method: str, path: str) -> None:
            if answered and own.number == kill_at:
                os.kill(child[0], signal.SIGKILL)

        HUB.fault, HUB.done = fault, done
        self._orders.write(f"{folder}\n")
        self._orders.flush()
        child.append(int(self._read_line()))
        born.set()
        ended = self._read_line()
        HUB.fault, HUB.done = lambda method, path: None, lambda method, path: None
        return ended

    def _read_line(self) -> str:
        return self._answers.readline().strip()

    def close(self) -> None:
        with self._process:
            self._process.kill()


@pytest.fixture
def pusher(hub: World, tmp_path: Path) -> Iterator[Pusher]:
    result = Pusher(tmp_path / "pushers-cache")
    yield result
    result.close()


def test_killed_push_leaves_one_bank_and_is_resumed(hub: World, tmp_path: Path, pusher: Pusher) -> None:
    banks = [written(tmp_path / str(seed), seed=seed) for seed in range(2)]
    shards = {file.sha256 for file in banks[1].manifest.files}
    assert pusher.push(banks[0].folder) == "done"
    repo, first = HUB.repo(NAME), HUB.repo(NAME).refs["main"]
    before = dict(HUB.objects)
    assert len(shards) == 3
    found = []
    for answered in (False, True):
        for at in count(1):
            repo.refs["main"] = first
            HUB.objects.clear()
            HUB.objects.update(before)
            if pusher.push(banks[1].folder, at, answered) == "done":
                break  # it has no more requests than that
            hub.clean()
            bank = ResponseBank.from_pretrained(NAME)
            assert contents(bank)
            seed = next(seed for seed in range(2) if is_seed(bank, seed))
            found.append((answered, seed))
            arrived = shards & set(HUB.objects)
            HUB.requests.clear()
            assert pusher.push(banks[1].folder) == "done"
            assert HUB.count("PUT", "^/lfs/") == len(shards - arrived)
            assert shards <= set(HUB.objects)
            assert is_seed(ResponseBank.from_pretrained(NAME), 1)
    assert {seed for answered, seed in found if not answered} == {0}
    assert len(found) >= 12
    assert (True, 1) in found  # the commit took effect, and its answer was not received
