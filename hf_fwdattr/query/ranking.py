"""Scores and best rows from directional derivatives and a bank's coordinates, one block of rows at a time."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import NumericalError


__all__ = ["Block", "RankedRows", "finite", "rank", "scores", "source_coordinates"]

Block = tuple[Tensor, Tensor, Tensor]  # ids (n,), sources (n,), coordinates (n, k)


@dataclass
class RankedRows:
    """Rows of one query, in order."""

    row_indices: Tensor  # (n,) position of each row in the training set
    ids: Tensor  # (n,) the rows' own ids
    sources: Tensor  # (n,) index of each row's source, -1 for none
    scores: Tensor  # (n,) nats
    token_scores: Tensor  # (n, positions) nats by output token; they add up to `scores`
    stds: Tensor  # (n,) standard deviation of the scores: of what codes leave out, or of the estimate; NaN if unknown
    exact: Tensor  # (n,) whether the score was read along the row's own response

    @classmethod
    def empty(cls, positions: int = 0) -> "RankedRows":
        """Return no rows, for outputs of so many positions."""
        index = torch.zeros(0, dtype=torch.int64)
        none = torch.zeros(0)
        return cls(index, index, index, none, torch.zeros(0, positions), none, none.bool())

    def top(self, count: int, sign: float) -> "RankedRows":
        """Return at most `count` rows whose scores have this sign, largest magnitude first."""
        order = torch.argsort(sign * self.scores, descending=True, stable=True)[:count]
        order = order[sign * self.scores[order] > 0]
        return RankedRows(*(getattr(self, field.name)[order] for field in fields(self)))


def scores(derivatives: Tensor, blocks: Iterable[Block]) -> Tensor:
    """Return the scores of all rows: (queries, rows) in nats, float32, on the CPU.

    Args:
        derivatives (`Tensor`): (queries, positions, k) directional derivatives.
        blocks: a bank's coordinates.

    Raises:
        NumericalError: a score is not finite.
    """
    summed = derivatives.double().sum(1).cpu().float()
    return torch.cat([finite(summed @ block.float().T) for _, _, block in blocks], dim=1)


def source_coordinates(blocks: Iterable[Block], count: int) -> Tensor:
    """Sum the coordinates of each source's rows, for sources without a direction of their own: (sources, k)."""
    total: Tensor | None = None
    for _, sources, block in blocks:
        total = torch.zeros(count, block.shape[1], dtype=torch.float64) if total is None else total
        has_source = sources >= 0
        total.index_add_(0, sources[has_source].long(), block[has_source].double())
    return torch.zeros(count, 0) if total is None else total


def rank(
    derivatives: Tensor, blocks: Iterable[Block], count: int, exact: bool = False
) -> list[tuple[RankedRows, RankedRows]]:
    """Return proponents (best first) and opponents (worst first) of each query; memory does not grow with rows.

    A row belongs to one list only: proponents have positive scores and opponents negative ones.

    Args:
        derivatives (`Tensor`): (queries, positions, k) directional derivatives.
        blocks: a bank's coordinates.
        count (`int`): rows on either side.
        exact (`bool`): whether the directions lose nothing of the rows.

    Raises:
        NumericalError: a score is not finite.
    """
    per_token = derivatives.double().cpu()
    summed = per_token.sum(1).float()
    best: list[dict[str, Tensor]] = [{} for _ in range(2 * len(summed))]
    start = 0
    for ids, sources, block in blocks:
        row_indices = torch.arange(start, start + len(ids))
        start += len(ids)
        for query, values in enumerate(finite(summed @ block.float().T)):
            for side, sign in enumerate((1.0, -1.0)):
                top = torch.topk(sign * values, min(count, len(values))).indices
                top = top[sign * values[top] > 0]
                part = {
                    "row_indices": row_indices[top], "ids": ids[top], "sources": sources[top],
                    "scores": values[top], "coordinates": block[top].double(),
                }  # fmt: skip
                slot = 2 * query + side
                best[slot] = _merge(best[slot], part, sign, count)
    return [
        (_ranked(best[2 * query], per_token[query], exact), _ranked(best[2 * query + 1], per_token[query], exact))
        for query in range(len(summed))
    ]


def finite(scores: Tensor) -> Tensor:
    """Return the scores themselves, if every one is finite.

    Raises:
        NumericalError: one is not.
    """
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError(
            "a row's score is not finite: the bank's coordinates or the query's directional derivatives hold NaN or "
            "infinity; build the bank again"
        )
    return scores


def _merge(old: dict[str, Tensor], new: dict[str, Tensor], sign: float, count: int) -> dict[str, Tensor]:
    joined = {key: torch.cat([old[key], new[key]]) if old else new[key] for key in new}
    order = torch.argsort(sign * joined["scores"], descending=True, stable=True)[:count]
    return {key: value[order] for key, value in joined.items()}


def _ranked(best: dict[str, Tensor], per_token: Tensor, exact: bool) -> RankedRows:
    token_scores, count = (best["coordinates"] @ per_token.T).float(), len(best["ids"])
    return RankedRows(
        best["row_indices"], best["ids"], best["sources"], best["scores"].float(), token_scores,
        torch.full((count,), 0.0 if exact else math.nan), torch.full((count,), exact),
    )  # fmt: skip
