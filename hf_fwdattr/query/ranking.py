"""From a readout and a bank's coordinates to scores and the best rows, one block of rows at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NumericalError


@dataclass
class RankedRows:
    """Rows of one query, best first.

    Attributes:
        positions (`Tensor`): (n,) place of each row in the training set.
        ids (`Tensor`): (n,) the rows' own ids.
        sources (`Tensor`): (n,) source of each, -1 for none.
        scores (`Tensor`): (n,) nats.
        token_scores (`Tensor`): (n, positions) nats owed per output token; they add up to `scores`.
    """

    positions: Tensor
    ids: Tensor
    sources: Tensor
    scores: Tensor
    token_scores: Tensor


Block = tuple[Tensor, Tensor, Tensor]  # ids (n,), sources (n,), coordinates (n, k)


def scores(readout: Tensor, blocks: Iterable[Block]) -> Tensor:
    """(queries, rows) in nats, float32, on the CPU.

    Args:
        readout (`Tensor`): (queries, positions, k).
        blocks: of a bank's coordinates.

    Raises:
        NumericalError: a score that is not finite.
    """
    summed = readout.double().sum(1).cpu().float()
    return torch.cat([_sound(summed @ block.float().T) for _, _, block in blocks], dim=1)


def source_coordinates(blocks: Iterable[Block], count: int) -> Tensor:
    """(sources, k): the summed coordinates of each source's rows, for sources without a direction of their own."""
    total: Tensor | None = None
    for _, sources, block in blocks:
        total = torch.zeros(count, block.shape[1], dtype=torch.float64) if total is None else total
        inside = sources >= 0
        total.index_add_(0, sources[inside].long(), block[inside].double())
    return torch.zeros(count, 0) if total is None else total


def rank(readout: Tensor, blocks: Iterable[Block], count: int) -> list[tuple[RankedRows, RankedRows]]:
    """Proponents (best first) and opponents (worst first) of each query; memory does not grow with rows.

    A row belongs to one list only: proponents have positive scores and opponents negative ones.

    Raises:
        NumericalError: a score that is not finite.
    """
    per_token = readout.double().cpu()
    summed = per_token.sum(1).float()
    best: list[dict[str, Tensor]] = [{} for _ in range(2 * len(summed))]
    at = 0
    for ids, sources, block in blocks:
        values = _sound(summed @ block.float().T)
        places = torch.arange(at, at + len(ids))
        at += len(ids)
        for query, line in enumerate(values):
            for side, sign in enumerate((1.0, -1.0)):
                top = torch.topk(sign * line, min(count, len(line))).indices
                top = top[sign * line[top] > 0]
                part = {
                    "positions": places[top], "ids": ids[top], "sources": sources[top],
                    "scores": line[top], "coordinates": block[top].double(),
                }  # fmt: skip
                slot = 2 * query + side
                best[slot] = _merge(best[slot], part, sign, count)
    return [
        (_finish(best[2 * query], per_token[query]), _finish(best[2 * query + 1], per_token[query]))
        for query in range(len(summed))
    ]


def _sound(scores: Tensor) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError(
            "a row's score is not finite: the bank's coordinates or the query's readout hold NaN or infinity; "
            "build the bank again"
        )
    return scores


def _merge(old: dict[str, Tensor], new: dict[str, Tensor], sign: float, count: int) -> dict[str, Tensor]:
    joined = {key: torch.cat([old[key], new[key]]) if old else new[key] for key in new}
    order = torch.argsort(sign * joined["scores"], descending=True, stable=True)[:count]
    return {key: value[order] for key, value in joined.items()}


def _finish(best: dict[str, Tensor], per_token: Tensor) -> RankedRows:
    tokens = (best["coordinates"] @ per_token.T).float()
    return RankedRows(best["positions"], best["ids"], best["sources"], best["scores"].float(), tokens)
