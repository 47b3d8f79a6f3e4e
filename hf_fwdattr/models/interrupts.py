"""Interrupts: Ctrl-C is held back while a model is put back as it was, and raised when it is."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT until the block has run, and deliver it then.

    For blocks that undo what was changed in a user's model: what takes microseconds need not be cut in two. Other
    threads than the main one are never interrupted, and handlers that Python did not install cannot be replaced: there
    the block just runs.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    received: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)
