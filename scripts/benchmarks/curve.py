"""Accuracy against forward passes: lines of a table, and two-stage scores with derivatives looked up in exact ones."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_fwdattr.query.gaussian_process import GaussianProcess
from hf_fwdattr.query.shortlist import refine


__all__ = ["TOP", "Covariance", "Curve", "combined", "two_stages"]

TOP = 10
ADAPTIVE_COMBINATIONS = 16


class Covariance(Protocol):
    """Covariance of the errors of coarse scores, as `HeldRowCodes` of a bank has it."""

    error_covariance: Tensor

    def combinations(self, count: int) -> tuple[Tensor, Any]:
        """Return the weights (rows, n) of the linear combinations that tell most, first."""


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


def two_stages(
    coarse: Tensor, exact: Tensor, covariance: Covariance | None, budget: int | None, share: int = 4
) -> tuple[Tensor, float]:
    """Score in two stages with the library's own shortlist; exact scores stand for derivatives.

    Args:
        coarse, exact (`Tensor`): (queries, rows).
        covariance (`Covariance`, *optional*): without it rows are chosen by their coarse scores alone.
        budget (`int`, *optional*): forward passes; None for adaptive mode.
        share (`int`): one in so many passes goes to linear combinations; 0 for none.

    Returns:
        Scores (queries, rows), and the passes of a query.
    """
    scores, passes = [], 0
    for prior, line in zip(coarse, exact, strict=True):
        process = None if covariance is None else GaussianProcess(prior, covariance.error_covariance)
        combinations = 0
        if covariance is not None and process is not None and share:
            combinations = ADAPTIVE_COMBINATIONS if budget is None else (budget - 1) // share
            weights = covariance.combinations(combinations)[0]
            process.observe_combinations(weights, weights.T @ line)
        estimate = prior if process is None else process.mean()
        rows = None if budget is None else budget - 1 - combinations
        refined = refine(estimate, process, TOP, rows, lambda index, line=line: line[index][None])
        scores.append(refined.scores)
        passes += 1 + combinations + len(refined.row_indices)
    return torch.stack(scores), passes / len(coarse)


def combined(coarse: Tensor, exact: Tensor, covariance: Covariance, count: int) -> Tensor:
    """Return scores (queries, rows) from coarse ones and passes along linear combinations of rows."""
    weights, scores = covariance.combinations(count)[0], []
    for prior, line in zip(coarse, exact, strict=True):
        process = GaussianProcess(prior, covariance.error_covariance)
        process.observe_combinations(weights, weights.T @ line)
        scores.append(process.mean())
    return torch.stack(scores)
