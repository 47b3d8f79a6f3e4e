"""Rows of one query named by reading few: in turns, each choosing by what the earlier ones say of the others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kriging import Kriging


TURNS = 3
DEVIATIONS = 2.0  # deviations that an unread row may be off by, measured by scripts/readout_curve.py
MOST = 256  # rows that are read for certainty, at most
_PROPONENTS = 2 / 3  # of the rows that are read; the others are opponents
_TURN = 24  # rows of a turn towards certainty


@dataclass
class Found:
    """What was read, and what is expected of the rest.

    Attributes:
        places (`Tensor`): (n,) ascending positions of the rows that were read.
        tokens (`Tensor`): (positions, n) their scores by output token, float64.
        estimate (`Tensor`): (rows,) scores, exact for the rows that were read, float64.
    """

    places: Tensor
    tokens: Tensor
    estimate: Tensor


Read = Callable[[Tensor], Tensor]  # ascending positions (n,) -> scores by output token (positions, n), float64


def search(estimate: Tensor, kernel: Tensor | None, count: int, rows: int | None, read: Read) -> Found:
    """Read the rows that matter.

    Args:
        estimate (`Tensor`): (rows,) scores as a first look has them.
        kernel (`Tensor`, *optional*): see `kriging`; without it all rows are chosen by the first look.
        count (`int`): rows to name on either side; so many are read in any case.
        rows (`int`, *optional*): how many to read. None: until no other row is likely to belong to the `count` best
            or worst, that is, to be off by more than `DEVIATIONS` deviations; at most `MOST`.
        read (`Callable`): what reads.
    """
    learned = None if kernel is None else Kriging(estimate, kernel)
    turns, total = (1 if learned is None else TURNS), len(estimate)
    if rows is None:
        turns, rows = -(-max(MOST, 2 * count) // _TURN), max(MOST, 2 * count)
    up = min(max(count, round(rows * _PROPONENTS)), total)
    down = min(max(count, rows - up), total)
    unread = torch.ones(total, dtype=torch.bool)
    places, tokens = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
    for turn in range(turns):
        best, worst = (side * (turn + 1) // turns - side * turn // turns for side in (up, down))
        chosen = _extremes(estimate, unread, best, worst)
        if not len(chosen):
            continue
        unread[chosen] = False
        new = read(chosen)
        places, tokens = torch.cat([places, chosen]), torch.cat([tokens, new], 1) if len(places) else new
        if learned is not None:
            learned.rows(chosen, new.sum(0))
            estimate = learned.expected()
            estimate[places] = tokens.sum(0)
            if turns > TURNS and _certain(estimate, learned.deviations(), unread, count):
                break
    places, order = places.sort()
    tokens = tokens[:, order]
    estimate = estimate.clone()
    estimate[places] = tokens.sum(0)
    return Found(places, tokens, estimate)


def _certain(estimate: Tensor, deviations: Tensor, unread: Tensor, count: int) -> bool:
    """Whether no unread row is likely to be among the best or the worst `count`, of scores on that side of zero."""
    for side in (estimate, -estimate):
        known = side[~unread].sort(descending=True).values
        if len(known) < count:
            return False
        if bool(((side + DEVIATIONS * deviations)[unread] > known[count - 1].clamp(min=0.0)).any()):
            return False
    return True


def _extremes(estimate: Tensor, unread: Tensor, best: int, worst: int) -> Tensor:
    """Ascending positions of so many rows with the highest and the lowest estimates, of those that are unread."""
    places = unread.nonzero().flatten()
    order = estimate[places].argsort(descending=True, stable=True)
    chosen = torch.cat([order[: min(best, len(order))], order[max(len(order) - worst, 0) :]])
    return places[chosen.unique()]
