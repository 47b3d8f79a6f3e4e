"""The queries of `scale`: the rows that are named, a sample of all estimates, and the time."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fwdattr.evaluation.cost import cost
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.ranking import RankedRows
from hf_fwdattr.query.results import Ranking
from hf_fwdattr.query.scorer import Scorer

from .curve import TOP
from .meters import Phases


__all__ = ["answers"]

_REPEATS = 3  # of a timed query
_SAMPLE = 500  # rows whose estimates are kept, spread over all
PHASES = {
    "forward": "hf_fwdattr.query.derivatives:QueryDerivatives.prepare",
    "derivatives": "hf_fwdattr.query.derivatives:_AtQueryWeights.jvp",
    "prediction": "hf_fwdattr.query.two_stage:TwoStageScorer.predicted_gradients",
    "estimates of all rows": "hf_fwdattr.query.two_stage:TwoStageScorer._estimates",
    "deviations of all rows": "hf_fwdattr.query.two_stage:TwoStageScorer._standard_deviations",
    "candidates": "hf_fwdattr.query.two_stage:TwoStageScorer._candidates",
    "products with codes": "hf_fwdattr.query.row_codes:HeldRowCodes.products",
    "decoding": "hf_fwdattr.query.row_codes:HeldRowCodes.rows",
    "noise of codes": "hf_fwdattr.query.two_stage:TwoStageScorer._code_noise",
    "Gaussian process": "hf_fwdattr.query.two_stage:refine",
}


def answers(scorer: Scorer, queries: Sequence[dict[str, Any]], budgets: Sequence[int], timed: int) -> dict[str, Any]:
    """Return by budget what is answered, and the times of some queries; also the time of the very first."""
    began = time.perf_counter()
    scorer.rank(queries[0], TOP, budgets[-1])
    result: dict[str, Any] = {"first query s": time.perf_counter() - began}
    for budget in budgets:
        found = [_answer(scorer.rank(query, TOP, budget)) for query in queries]
        result[str(budget)] = {"queries": found} | _times(scorer, queries[:timed], budget)
    phases = Phases(PHASES)
    with phases.measured():
        began = time.process_time()
        for query in queries:
            scorer.rank(query, TOP, budgets[-1])
        phases.seconds["other"] = time.process_time() - began - sum(phases.seconds.values())
    return result | {"phases ms": {name: 1000 * spent / len(queries) for name, spent in phases.seconds.items()}}


def _answer(ranking: Ranking) -> dict[str, Any]:
    """Return the rows that are named, and estimates of others, in plain values."""
    deviations = getattr(ranking, "stds", None)
    sample = torch.linspace(0, len(ranking.scores) - 1, min(_SAMPLE, len(ranking.scores))).long()
    return {
        "passes": ranking.passes, "proponents": _plain_values(ranking.proponents),
        "opponents": _plain_values(ranking.opponents),
        "sample": {
            "rows": sample.tolist(), "scores": ranking.scores[sample].tolist(),
            "stds": None if deviations is None else deviations[sample].tolist(),
        },
    }  # fmt: skip


def _plain_values(rows: RankedRows) -> dict[str, list[Any] | None]:
    """Return rows and scores, with standard deviations and whether each was read exactly where the library says so."""
    fields = {"rows": rows.row_indices, "scores": rows.scores}
    fields |= {name: getattr(rows, name, None) for name in ("stds", "exact")}
    return {name: value.tolist() if isinstance(value, Tensor) else None for name, value in fields.items()}


def _times(scorer: Scorer, queries: Sequence[dict[str, Any]], budget: int) -> dict[str, float]:
    """Return medians over queries of a query's time, in plain forward passes of the same text and in milliseconds."""
    costs = []
    for query in queries:
        batch = scorer.batch([query])

        @torch.no_grad()
        def forward(batch: dict[str, Tensor] = batch) -> None:
            CAUSAL_LM.forward(scorer.model, batch)

        def read(query: dict[str, Any] = query) -> None:
            scorer.rank(query, TOP, budget)

        costs.append(cost(read, forward, _REPEATS, time.process_time))
    return {
        "forwards": statistics.median(one.ratio for one in costs),
        "ms": 1000 * statistics.median(one.seconds for one in costs),
    }
