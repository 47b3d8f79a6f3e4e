"""Progress bars of the passes: lively in a terminal or notebook, and few lines in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


__all__ = ["progress_bar"]

_LOG_INTERVAL = 30.0  # seconds between two lines of a log


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """Return a bar that goes when it is done; settings are those of tqdm."""
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        settings |= {"mininterval": _LOG_INTERVAL, "maxinterval": _LOG_INTERVAL}
    return tqdm(iterable, leave=False, **settings)
