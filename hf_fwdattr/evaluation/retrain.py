"""Ground truth by retraining: resumable, because every run's outcome is a file of its own."""

import hashlib
import inspect
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm


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
    """Outcomes of retraining on each subset with each seed.

    Args:
        train (`Callable`): (subset (rows,), seed) -> outcomes (queries,), for example each query's loss in nats. The
            subset is a line of `subsets`: booleans that keep rows, or float weights.
        subsets (`Tensor`): (subsets, rows).
        seeds (`Sequence[int]`): one retraining per subset and seed.
        folder (`str` or `Path`): where outcomes are kept; runs found there are not repeated. A run is known by
            `name`, the subset's content, and the seed.
        workers (`int`): processes that train side by side, with one thread each; `train` must then be importable.
        name (`str`, *optional*): what tells this `train` from another one, with the version of whatever it reads.
            By default its name and its source code; what it calls is not looked at.
        together (`int`): where positive, `train` takes (subsets (n, rows), list of n seeds) with n up to this number
            and gives (n, queries).

    Returns:
        (seeds, subsets, queries), float64.

    Raises:
        ValueError: `train` cannot be told from others by its code (a closure or an object), and `name` is not given.
    """
    name = identity(train) if name is None else name
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(index, seed) for seed in seeds for index in range(len(subsets))]
    paths = {run: folder / f"{_key(name, subsets[run[0]], run[1])}.json" for run in runs}
    missing = [run for run in runs if not paths[run].exists()]
    size = max(group_size, 1)
    handfuls = [missing[start : start + size] for start in range(0, len(missing), size)]
    jobs = [
        (
            train,
            [subsets[i] for i, _ in runs],
            [seed for _, seed in runs],
            [paths[run] for run in runs],
            group_size > 0,
        )
        for runs in handfuls
    ]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=description, disable=quiet) as bar:
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
    """Name and source code of a plain function, hashed: another `train` in the same folder is not mistaken for it.

    Raises:
        ValueError: it is no plain function, or one that remembers values of where it was made.
    """
    function = inspect.unwrap(train)
    if not inspect.isfunction(function) or function.__closure__:
        raise ValueError(
            f"train={train!r} holds values that its code does not show, so its runs could be mistaken for another's "
            "in the same folder; say name=, with whatever its outcome depends on"
        )
    try:
        code = inspect.getsource(function)
    except OSError:
        code = repr(_compiled(function.__code__))
    return f"{function.__qualname__} {hashlib.sha256(code.encode()).hexdigest()}"


def _compiled(code: CodeType) -> tuple[Any, ...]:
    """What tells one compiled function from another, functions within it too: no place in memory, so that it lasts."""
    within = [_compiled(value) if isinstance(value, CodeType) else value for value in code.co_consts]
    return code.co_code, code.co_names, within


def _key(name: str, subset: Tensor, seed: int) -> str:
    return hashlib.sha256(f"{name} {subset.dtype} {seed} ".encode() + subset.numpy().tobytes()).hexdigest()[:32]


def _run(
    train: Callable[..., Tensor], subsets: list[Tensor], seeds: list[int], paths: list[Path], group_size: bool
) -> int:
    """A handful of retrainings, whose outcomes appear under their names only when they are whole."""
    if group_size:
        outcomes = train(torch.stack(subsets), seeds)
    else:
        outcomes = train(subsets[0], seeds[0])[None]
    if len(outcomes) != len(paths):
        raise ValueError(f"train gave outcomes of {len(outcomes)} retrainings where {len(paths)} were asked for")
    for outcome, path in zip(outcomes.double().tolist(), paths, strict=True):
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(outcome))
        scratch.replace(path)
    return len(paths)
