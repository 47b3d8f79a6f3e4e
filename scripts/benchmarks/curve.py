"""Accuracy against forward passes: lines of a table, and two-stage scores with derivatives looked up in exact ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_fwdattr.query.gaussian_process import CandidateScores, GaussianProcess
from hf_fwdattr.query.shortlist import refine


__all__ = ["TOP", "Curve", "ScoreBasis", "shared_top", "two_stages"]

TOP = 10


@dataclass
class ScoreBasis:
    """Leading linear combinations of rows' scores, from scores of rows as queries.

    Attributes:
        vectors (`Tensor`): (rows, k) orthonormal weights of rows, leading ones first.
        variances (`Tensor`): (k,) mean squares of the combinations' scores.
        own (`Tensor`): (rows,) what of a row's mean squared score is outside them.
    """

    vectors: Tensor
    variances: Tensor
    own: Tensor

    @classmethod
    def of(cls, scores: Tensor, count: int) -> "ScoreBasis":
        """Return the basis of scores (rows as queries, rows); those of rows on themselves are left out."""
        others = scores.double().clone().fill_diagonal_(0.0)
        covariance = others.T @ others / len(others)
        values, vectors = (part.flip(-1)[..., :count] for part in torch.linalg.eigh(covariance))
        own = covariance.diagonal() - (vectors.square() * values).sum(1)
        return cls(vectors, values, own.clamp(min=0.0))


class Curve:
    """Lines of the table, against exact scores.

    Args:
        exact (`Tensor`): (queries, rows).
        judge (`Callable`, *optional*): scores -> LDS.
    """

    def __init__(self, exact: Tensor, judge: Callable[[Tensor], float] | None = None):
        self.exact, self._judge = exact, judge
        self.rows: list[dict[str, Any]] = []
        self._top = exact.topk(TOP, 1).indices

    def add(
        self, method: str, passes: float, scores: Tensor, time: float | None = None, half: float | None = None
    ) -> None:
        """Add a way of reading; times are in plain forward passes, `half` with products in bfloat16."""
        shared = shared_top(scores, self._top)
        pairs = zip(scores.double(), self.exact.double(), strict=True)
        correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
        row: dict[str, Any] = {"method": method, "forward passes": round(passes, 1)}
        if self._judge is not None:
            row["LDS"] = self._judge(scores.float())
        row |= {
            "of the top ten": float(shared.mean()), "all of the top ten": float((shared == 1).double().mean()),
            "correlation": float(correlation.mean()), "time in forwards": "-" if time is None else round(time, 2),
            "in bfloat16": "-" if half is None else round(half, 2),
        }  # fmt: skip
        self.rows.append(row)
        print(row, flush=True)

    def sorted(self) -> list[dict[str, Any]]:
        """Return the lines with those of one method together."""
        order = list(dict.fromkeys(row["method"] for row in self.rows))
        return sorted(self.rows, key=lambda row: order.index(row["method"]))


def shared_top(scores: Tensor, top: Tensor) -> Tensor:
    """Return the share (queries,) of the row indices `top` (queries, n) that scores rank first."""
    found = scores.topk(top.shape[1], 1).indices
    pairs = zip(found.tolist(), top.tolist(), strict=True)
    return torch.tensor([len(set(a) & set(b)) / len(b) for a, b in pairs], dtype=torch.float64)


def two_stages(exact: Tensor, basis: ScoreBasis, budget: int, share: int = 4) -> tuple[Tensor, float]:
    """Score in two stages with the library's own process and shortlist; exact scores stand for derivatives.

    Args:
        exact (`Tensor`): (queries, rows).
        basis (`ScoreBasis`): combinations that are read first.
        budget (`int`): forward passes.
        share (`int`): one in so many passes goes to combinations; 0 for none.

    Returns:
        Scores (queries, rows), and the passes of a query.
    """
    scores, passes = [], 0
    read_first = min((budget - 1) // share, len(basis.variances)) if share else 0
    for line in exact.double():
        process = GaussianProcess(basis.variances)
        candidates = CandidateScores(process, torch.zeros_like(line), basis.vectors, basis.own)
        first = torch.eye(read_first, len(basis.variances))
        process.observe(first, line @ basis.vectors[:, :read_first], torch.zeros(read_first))
        rows = budget - 1 - read_first
        refined = refine(candidates.mean(), candidates, TOP, rows, lambda index, line=line: line[index][None])
        scores.append(refined.scores)
        passes += 1 + read_first + len(refined.row_indices)
    return torch.stack(scores), passes / len(exact)
