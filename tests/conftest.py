import gc
import os
from pathlib import Path

from tests.helpers.hub_server import HUB


# huggingface_hub reads these once, when it is first imported: the whole run talks to the server of these tests, which
# is empty until a test fills it, and to nobody else.
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

from tests.helpers.hub_world import hub as hub


torch.set_num_threads(1)  # the models are so tiny that threads only wait for each other

TESTS = Path(__file__).parent
# The files that take longest, the longest first: begun last, one would run while the other process has nothing left.
SLOWEST = (
    "trainer/test_ranks.py", "benchmarks/test_worlds.py", "bank/test_published.py", "test_end_to_end.py",
    "trainer/test_killed_run.py", "examples/test_examples.py", "bank/test_killed_push.py", "trainer/test_callback.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of files: xdist would begin with those of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).as_posix(), len(places)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: Trainer calls it at the end of every training, for 0.3 s."""
    gc.collect()
    gc.freeze()
