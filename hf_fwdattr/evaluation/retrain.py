"""Ground truth by retraining: resumable, because every run's outcome is a file of its own."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
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
) -> Tensor:
    """Outcomes of retraining on each subset with each seed.

    Args:
        train (`Callable`): (subset (rows,), seed) -> outcomes (queries,), for example each query's loss in nats. The
            subset is a line of `subsets`: booleans that keep rows, or float weights.
        subsets (`Tensor`): (subsets, rows).
        seeds (`Sequence[int]`): one retraining per subset and seed.
        folder (`str` or `Path`): where outcomes are kept; runs found there, by content of subset and seed, are not
            repeated. Use another folder for another `train`.

    Returns:
        (seeds, subsets, queries), float64.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[tuple[int, int], list[float]] = {}
    runs = [(i, seed) for i in range(len(subsets)) for seed in seeds]
    for index, seed in tqdm(runs, desc=description, disable=quiet):
        key = hashlib.sha256(f"{subsets.dtype} {seed} ".encode() + subsets[index].numpy().tobytes()).hexdigest()[:32]
        path = folder / f"{key}.json"
        if not path.exists():
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(train(subsets[index], seed).double().tolist()))
            scratch.replace(path)
        outcomes[index, seed] = json.loads(path.read_text())
    return torch.tensor([[outcomes[i, seed] for i in range(len(subsets))] for seed in seeds], dtype=torch.float64)
