"""Shortlist of rows that are scored exactly: chosen in turns, each turn using what the earlier ones have shown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian_process import CandidateScores


__all__ = ["DEVIATIONS", "MOST", "TURNS", "ReadRows", "RefinedScores", "refine"]

TURNS = 4
DEVIATIONS = 2.0  # standard deviations that are allowed to an unread row in adaptive mode
MOST = 256  # largest number of rows read in adaptive mode
_PROPONENT_SHARE = 2 / 3  # of the rows that are read, as long as nothing else is known; the others are opponents
_PROPONENT_WORTH = 30.0  # opponents that are as important as a proponent, of equal chances
_ADAPTIVE_TURN = 24  # rows of a turn in adaptive mode
ReadRows = Callable[[Tensor], Tensor]  # ascending row indices (n,) -> exact token scores (positions, n), float64


@dataclass
class RefinedScores:
    """Scores of all rows after some were read exactly."""

    row_indices: Tensor  # (n,) ascending indices of the rows that were read
    token_scores: Tensor  # (positions, n) their scores by output token, float64
    scores: Tensor  # (rows,) float64; exact for the rows that were read, estimated for the others


def refine(
    coarse: Tensor, process: CandidateScores | None, top_k: int, budget: int | None, read: ReadRows
) -> RefinedScores:
    """Read the rows exactly that are likely to be the best and the worst.

    Args:
        coarse (`Tensor`): (rows,) estimated scores.
        process (`CandidateScores`, *optional*): posterior of this query so far; rows that are read are added to it.
            A turn then reads the rows that may be best or worst, one standard deviation allowed. Without it all rows
            are chosen at once by their coarse scores.
        top_k (`int`): rows to name on either side; so many are read in any case.
        budget (`int`, *optional*): rows to read. None for adaptive mode: until no other row is likely to be among the
            `top_k` best or worst, that is, to deviate by more than `DEVIATIONS`; at most `MOST`.
        read (`Callable`): returns the exact token scores of rows.
    """
    turns, total = (1 if process is None else TURNS), len(coarse)
    adaptive = budget is None
    if budget is None:
        budget = max(MOST, 2 * top_k)
        turns = -(-budget // _ADAPTIVE_TURN)
    proponents = min(max(top_k, round(budget * _PROPONENT_SHARE)), total)
    opponents = min(max(top_k, budget - proponents), total)
    scores, std = coarse, torch.zeros(total) if process is None else process.std()
    unread, read_on_side = torch.ones(total, dtype=torch.bool), [0, 0]
    row_indices, token_scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
    for turn in range(turns):
        counts = [side * (turn + 1) // turns - side * turn // turns for side in (proponents, opponents)]
        if top_k and process is not None and bool(std.isfinite().all()):
            least = [min(top_k, total) * (turn + 1) // turns - count for count in read_on_side]
            counts = _shares(scores, std, unread, top_k, sum(counts), least)
        read_on_side = [count + more for count, more in zip(read_on_side, counts, strict=True)]
        chosen = _extremes(scores, std, unread, *counts)
        if not len(chosen):
            continue
        unread[chosen] = False
        exact = read(chosen)
        token_scores = torch.cat([token_scores, exact], 1) if len(row_indices) else exact
        row_indices = torch.cat([row_indices, chosen])
        if process is not None:
            process.observe_rows(chosen, exact.sum(0))
            scores = process.mean()
            scores[row_indices] = token_scores.sum(0)
            std = process.std() if adaptive or turn + 1 < turns else std
            if adaptive and _is_complete(scores, std, unread, top_k):
                break
    row_indices, order = row_indices.sort()
    token_scores = token_scores[:, order]
    scores = scores.clone()
    scores[row_indices] = token_scores.sum(0)
    return RefinedScores(row_indices, token_scores, scores)


def _is_complete(scores: Tensor, std: Tensor, unread: Tensor, top_k: int) -> bool:
    """Return whether no unread row is likely to be among the best or worst `top_k` on its side of zero."""
    for side in (scores, -scores):
        exact = side[~unread].sort(descending=True).values
        if len(exact) < top_k:
            return False
        if bool(((side + DEVIATIONS * std)[unread] > exact[top_k - 1].clamp(min=0.0)).any()):
            return False
    return True


def _extremes(scores: Tensor, std: Tensor, unread: Tensor, best: int, worst: int) -> Tensor:
    """Return the ascending indices of so many unread rows that may have the highest and the lowest scores."""
    candidates = unread.nonzero().flatten()
    allowance = torch.where(std.isfinite(), std, 0.0)[candidates]
    highest = (scores[candidates] + allowance).argsort(descending=True, stable=True)[:best]
    lowest = (scores[candidates] - allowance).argsort(stable=True)[:worst]
    return candidates[torch.cat([highest, lowest]).unique()]


def _shares(scores: Tensor, std: Tensor, unread: Tensor, top_k: int, count: int, least: Sequence[int]) -> list[int]:
    """Return how many of `count` rows are to be read as proponents and as opponents.

    Those go first that are likeliest to belong to the `top_k` of their side. A proponent is worth several opponents:
    `_PROPONENT_WORTH`.

    Args:
        least: proponents and opponents that are read in any case.
    """
    chances = []
    for side, worth in ((1.0, _PROPONENT_WORTH), (-1.0, 1.0)):
        threshold = (side * scores).topk(min(top_k, len(scores))).values[-1]
        distance = (side * scores[unread] - threshold) / std[unread].clamp(min=1e-300)
        chances.append(torch.special.log_ndtr(distance).sort(descending=True).values[:count] + math.log(worth))
    least = [min(max(one, 0), count) for one in least]
    order = torch.cat(chances).argsort(descending=True, stable=True)[:count]
    proponents = int((order < len(chances[0])).sum())
    proponents = max(min(proponents, count - least[1]), least[0])
    return [proponents, max(count - proponents, least[1])]
