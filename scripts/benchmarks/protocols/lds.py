"""Linear datamodeling score (LDS) of every method of a world against real retraining on random halves.

Each half of the rows is fine-tuned by the real Trainer with a few fresh seeds, and the losses of the queries after it
are kept: a killed run goes on. The score of a half is the sum of its rows' scores; LDS is the rank correlation over
halves, averaged over queries, with a bootstrap interval over queries. Where some rows carry a wrong label on purpose,
the last column says how well a row's score for its own label tells them.
"""

import time
from typing import Any

from torch import Tensor

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds, mislabelled_auc, noise_ceiling

from ..registry import load_world, make_method
from ..report.results import report, result_name
from ..world import ClassificationWorld, Scores, World


def run(
    world: str = "lora-news", halves: int | None = None, seeds: int | None = None, workers: int = 2,
    methods: tuple[str, ...] = (), model: str | None = None,
) -> None:  # fmt: skip
    started, chosen = time.time(), load_world(world, **({"model": model} if model else {}))
    subsets = random_halves(len(chosen.rows), halves or chosen.halves)
    count = seeds or chosen.seeds
    outcomes = chosen.retrain(subsets, range(1, count + 1), workers)
    rows = []
    for label, (name, settings) in chosen.lines.items():
        if not methods or label in methods:
            scores = make_method(name, **settings).scores(chosen)
            rows.append({"method": label} | line(chosen, scores, subsets, outcomes))
            print(rows[-1], flush=True)
    facts: dict[str, Any] = {"halves": len(subsets), "seeds": count}
    if count > 1:
        facts["noise_ceiling"] = round(noise_ceiling(outcomes).mean, 4)
    if isinstance(chosen, ClassificationWorld):
        facts["accuracy"] = chosen.accuracy(chosen.trained)
    title = f"{world}: LDS against the mean of {count} retrainings of {len(subsets)} halves"
    report(result_name("lds", world), title, rows, started, **facts)


def line(world: World, scores: Scores, subsets: Tensor, outcomes: Tensor) -> dict[str, Any]:
    """Return a method's figures: against the mean of the retrainings and against one of them, and its cost."""
    found: dict[str, Any] = dict.fromkeys(("LDS", "low", "high", "LDS one retraining"), "-")
    if scores.values is not None:
        mean = lds(scores.values, subsets, outcomes.mean(0))
        one = lds(scores.values, subsets, outcomes[0])
        found = {"LDS": mean.mean, "low": mean.low, "high": mean.high, "LDS one retraining": one.mean}
    if world.mislabelled is not None:
        own = scores.own
        found["AUC, wrong labels"] = "-" if own is None else mislabelled_auc(own, world.mislabelled)
    return found | {key: scores.cost.get(key, "-") for key in ("directions", "explained variance", "s / query")}
