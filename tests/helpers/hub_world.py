"""A test's view of the Hub: an empty server, a token, a cache of its own, and a way to go offline."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.helpers.hub_server import HUB, TOKEN, Hub


class World:
    """The value of the `hub` fixture.

    Attributes:
        server (`Hub`): the server, emptied for this test.
        cache (`Path`): the Hub's cache.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.server: Hub = HUB
        self._patch, self._folder, self._caches = monkeypatch, folder, 0
        self.clean()
        self.log_in()

    def clean(self) -> None:
        """Use an empty cache from now on."""
        self._caches += 1
        self.cache = self._folder / f"cache-{self._caches}"
        self._patch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        self.server.requests.clear()

    def log_in(self) -> None:
        self._patch.setenv("HF_TOKEN", TOKEN)

    def log_out(self) -> None:
        self._patch.delenv("HF_TOKEN", raising=False)

    def offline(self) -> None:
        """Behave as with HF_HUB_OFFLINE=1, and drop every request too."""
        self._patch.setattr(constants, "HF_HUB_OFFLINE", True)
        self.server.fault = lambda method, path: "drop"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    HUB.repos.clear()
    HUB.objects.clear()
    HUB.reset()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
    yield World(monkeypatch, tmp_path)
    HUB.reset()
