"""Lock around queries: one at a time in a process, so that threads may share a pipeline, a scorer or a model.

A query changes state that its model and torch share between threads: weights are swapped for their mean over training
and back, activations are replaced, hooks are set, attention kernels are chosen. Models share modules with each other,
as two adapters on one base do, and so the lock is not per model.
"""

import os
from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar


__all__ = ["one_at_a_time"]

P = ParamSpec("P")
R = TypeVar("R")

_locks = [RLock()]


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run in one thread at a time, together with all functions that are decorated so."""

    @wraps(function)
    def serial(*args: P.args, **kwargs: P.kwargs) -> R:
        with _locks[0]:
            return function(*args, **kwargs)

    return serial


def _renew() -> None:
    _locks[0] = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)  # a thread that is not in the child may hold the parent's lock
