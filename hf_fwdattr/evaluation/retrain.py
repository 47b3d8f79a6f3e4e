"""Ground truth by retraining: resumable, because every run's outcome is a file of its own."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm


def retrain(
    train: Callable[[Tensor, int], Tensor],
    subsets: Tensor,
    seeds: Sequence[int],
    folder: str | Path,
    description: str = "retraining",
    quiet: bool = False,
    workers: int = 1,
) -> Tensor:
    """Outcomes of retraining on each subset with each seed.

    Args:
        train (`Callable`): (subset (rows,), seed) -> outcomes (queries,), for example each query's loss in nats. The
            subset is a line of `subsets`: booleans that keep rows, or float weights.
        subsets (`Tensor`): (subsets, rows).
        seeds (`Sequence[int]`): one retraining per subset and seed.
        folder (`str` or `Path`): where outcomes are kept; runs found there, by content of subset and seed, are not
            repeated. Use another folder for another `train`.
        workers (`int`): processes that train side by side, with one thread each; `train` must then be importable.

    Returns:
        (seeds, subsets, queries), float64.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(index, seed) for seed in seeds for index in range(len(subsets))]
    paths = {run: folder / f"{_key(subsets[run[0]], run[1])}.json" for run in runs}
    missing = [run for run in runs if not paths[run].exists()]
    jobs = [(train, subsets[index], seed, paths[index, seed]) for index, seed in missing]
    with tqdm(total=len(runs), initial=len(runs) - len(jobs), desc=description, disable=quiet) as bar:
        if workers == 1:
            for job in jobs:
                _run(*job)
                bar.update()
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                for done in as_completed([pool.submit(_run, *job) for job in jobs]):
                    done.result()
                    bar.update()
    outcomes = [[json.loads(paths[index, seed].read_text()) for index in range(len(subsets))] for seed in seeds]
    return torch.tensor(outcomes, dtype=torch.float64)


def _key(subset: Tensor, seed: int) -> str:
    return hashlib.sha256(f"{subset.dtype} {seed} ".encode() + subset.numpy().tobytes()).hexdigest()[:32]


def _run(train: Callable[[Tensor, int], Tensor], subset: Tensor, seed: int, path: Path) -> None:
    """One retraining, whose outcome appears under its name only when it is whole."""
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(train(subset, seed).double().tolist()))
    scratch.replace(path)
