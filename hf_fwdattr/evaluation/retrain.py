"""Ground truth by retraining, resumable: the outcome of every run is a file."""

import hashlib
import inspect
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm


__all__ = ["identity", "retrain"]


def retrain(
    train: Callable[..., Tensor],
    subsets: Tensor,
    seeds: Sequence[int],
    folder: str | Path,
    description: str = "retraining",
    quiet: bool = False,
    workers: int = 1,
    name: str | None = None,
    group_size: int = 0,
) -> Tensor:
    """Retrain on each subset with each seed, and return the outcomes.

    Args:
        train (`Callable`): (subset (rows,), seed) -> outcomes (queries,), for example each query's loss in nats. The
            subset is a line of `subsets`: booleans that keep rows, or float weights.
        subsets (`Tensor`): (subsets, rows).
        seeds (`Sequence[int]`): one retraining per subset and seed.
        folder (`str` or `Path`): keeps the outcomes; runs with an outcome there are not repeated. A run is identified
            by `name`, the subset's content, and the seed.
        workers (`int`): processes that train side by side, with one thread each; `train` must then be importable.
        name (`str`, *optional*): identifies `train` and the version of everything that it reads. By default its name
            and its source code, without the code of the functions that it calls.
        group_size (`int`): where positive, `train` takes (subsets (n, rows), list of n seeds) with n up to this number
            and returns (n, queries).

    Returns:
        (seeds, subsets, queries), float64.

    Raises:
        ValueError: `train` cannot be identified by its code (a closure or an object), and `name` is not given.
    """
    name = identity(train) if name is None else name
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(index, seed) for seed in seeds for index in range(len(subsets))]
    paths = {run: folder / f"{_key(name, subsets[run[0]], run[1])}.json" for run in runs}
    missing = [run for run in runs if not paths[run].exists()]
    size = max(group_size, 1)
    groups = [missing[start : start + size] for start in range(0, len(missing), size)]
    jobs = [
        (train, [subsets[i] for i, _ in group], [seed for _, seed in group], [paths[run] for run in group], group_size)
        for group in groups
    ]
    interval = 0.1 if sys.stderr.isatty() else 60.0  # seconds between two lines of a log
    with tqdm(
        total=len(runs), initial=len(runs) - len(missing), desc=description, disable=quiet, mininterval=interval,
        maxinterval=max(interval, 10.0),
    ) as bar:  # fmt: skip
        if workers == 1:
            for job in jobs:
                bar.update(_run(*job))
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                for done in as_completed([pool.submit(_run, *job) for job in jobs]):
                    bar.update(done.result())
    outcomes = [[json.loads(paths[index, seed].read_text()) for index in range(len(subsets))] for seed in seeds]
    return torch.tensor(outcomes, dtype=torch.float64)


def identity(train: Callable[..., Any]) -> str:
    """Return the name and hashed source code of a plain function, which tell it from another one in the same folder.

    Raises:
        ValueError: not a plain function, or one with a closure.
    """
    function = inspect.unwrap(train)
    if not inspect.isfunction(function) or function.__closure__:
        raise ValueError(
            f"train={train!r} holds values that its code does not show, so its runs could be mistaken for another's "
            "in the same folder; say name=, with everything that its outcome depends on"
        )
    try:
        code = inspect.getsource(function)
    except OSError:
        code = repr(_compiled(function.__code__))
    return f"{function.__qualname__} {hashlib.sha256(code.encode()).hexdigest()}"


def _compiled(code: CodeType) -> tuple[Any, ...]:
    """Return the operations, names and constants of a compiled function and its inner ones, without addresses."""
    constants = [_compiled(value) if isinstance(value, CodeType) else value for value in code.co_consts]
    return code.co_code, code.co_names, constants


def _key(name: str, subset: Tensor, seed: int) -> str:
    return hashlib.sha256(f"{name} {subset.dtype} {seed} ".encode() + subset.numpy().tobytes()).hexdigest()[:32]


def _run(
    train: Callable[..., Tensor], subsets: list[Tensor], seeds: list[int], paths: list[Path], group_size: int
) -> int:
    """Retrain one group and write its outcomes; a file appears under its name only when it is complete."""
    outcomes = train(torch.stack(subsets), seeds) if group_size > 0 else train(subsets[0], seeds[0])[None]
    if len(outcomes) != len(paths):
        raise ValueError(f"train returned outcomes of {len(outcomes)} retrainings where {len(paths)} were asked for")
    for outcome, path in zip(outcomes.double().tolist(), paths, strict=True):
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(outcome))
        scratch.replace(path)
    return len(paths)
