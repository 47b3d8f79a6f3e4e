"""Meters of a process: seconds by phase, and peak memory."""

import hashlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import hf_fwdattr


__all__ = ["PeakMemory", "Phases", "code_version"]

_PERIOD = 0.05  # seconds between looks at the memory that no file stands behind


class Phases:
    """Processor's seconds spent in chosen functions, each without those it calls.

    Args:
        functions (`Mapping[str, str]`): label -> `module:name` or `module:class.name`; what does not exist is left
            out, so that measurements outlive the functions.
    """

    def __init__(self, functions: Mapping[str, str]):
        self.seconds: dict[str, float] = {}
        self._functions, self._within = functions, [0.0]

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Replace the functions by timed ones inside the context."""
        with ExitStack() as stack:
            for label, path in self._functions.items():
                module_name, _, names = path.partition(":")
                *owners, name = names.split(".")
                try:
                    owner: Any = importlib.import_module(module_name)
                    for part in owners:
                        owner = getattr(owner, part)
                    function = getattr(owner, name)
                except (ImportError, AttributeError):
                    continue
                stack.enter_context(mock.patch.object(owner, name, self._timed(label, function)))
            yield

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            self._within.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                spent, inner = time.process_time() - began, self._within.pop()
                self._within[-1] += spent
                self.seconds[label] = self.seconds.get(label, 0.0) + spent - inner

        return call


class PeakMemory:
    """Peak memory of this process in MiB, files that are mapped counted and not.

    The first is the kernel's own high-water mark of this process (not `ru_maxrss`, which survives exec and would
    report the parent's); the second is looked at twenty times a second inside the context.
    """

    def __init__(self) -> None:
        self._anonymous, self._stop = 0, threading.Event()

    def __enter__(self) -> "PeakMemory":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD):
            self._anonymous = max(self._anonymous, _status("RssAnon"))

    @property
    def peaks(self) -> dict[str, int]:
        """Both peaks so far."""
        anonymous = max(self._anonymous, _status("RssAnon"))
        return {"peak MiB": _status("VmHWM") // 1024, "peak without files MiB": anonymous // 1024}


def _status(field: str) -> int:
    """Return a field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def code_version(rooms: tuple[str, ...], *more: object) -> str:
    """Return a hash of the sources of these rooms of the library, and of whatever else matters."""
    root = Path(hf_fwdattr.__file__).parent
    paths = [path for room in rooms for path in sorted((root / room).rglob("*.py"))]
    digest = hashlib.sha256(repr(more).encode())
    for path in [root / "config.py", *paths]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
