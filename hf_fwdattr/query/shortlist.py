"""Rows of one query named by reading few: in turns, each choosing by what the earlier ones say of the others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gaussian_process import GaussianProcess


TURNS = 4
DEVIATIONS = 2.0  # deviations that an unread row may be off by, measured by scripts/readout_curve.py
MOST = 256  # rows that are read for certainty, at most
_PROPONENTS = 2 / 3  # of the rows that are read; the others are opponents
_TURN = 24  # rows of a turn towards certainty


@dataclass
class RefinedScores:
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


def search(
    estimate: Tensor, learned: GaussianProcess | None, count: int, rows: int | None, read: Read
) -> RefinedScores:
    """Read the rows that matter.

    Args:
        estimate (`Tensor`): (rows,) scores as a first look has them.
        learned (`GaussianProcess`, *optional*): what is known of this query so far, to which what is read is added. A turn
            then reads rows that may be best or worst: one deviation is allowed for. Without it all rows are chosen by
            the first look.
        count (`int`): rows to name on either side; so many are read in any case.
        rows (`int`, *optional*): how many to read. None: until no other row is likely to belong to the `count` best
            or worst, that is, to be off by more than `DEVIATIONS` deviations; at most `MOST`.
        read (`Callable`): what reads.
    """
    turns, total = (1 if learned is None else TURNS), len(estimate)
    until_certain = rows is None
    if rows is None:
        turns, rows = -(-max(MOST, 2 * count) // _TURN), max(MOST, 2 * count)
    up = min(max(count, round(rows * _PROPONENTS)), total)
    down = min(max(count, rows - up), total)
    unread = torch.ones(total, dtype=torch.bool)
    places, tokens = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
    deviations = torch.zeros(total) if learned is None else learned.deviations()
    for turn in range(turns):
        best, worst = (side * (turn + 1) // turns - side * turn // turns for side in (up, down))
        chosen = _extremes(estimate, deviations, unread, best, worst)
        if not len(chosen):
            continue
        unread[chosen] = False
        new = read(chosen)
        places, tokens = torch.cat([places, chosen]), torch.cat([tokens, new], 1) if len(places) else new
        if learned is not None:
            learned.rows(chosen, new.sum(0))
            estimate = learned.expected()
            estimate[places] = tokens.sum(0)
            deviations = learned.deviations()
            if until_certain and _certain(estimate, deviations, unread, count):
                break
    places, order = places.sort()
    tokens = tokens[:, order]
    estimate = estimate.clone()
    estimate[places] = tokens.sum(0)
    return RefinedScores(places, tokens, estimate)


def _certain(estimate: Tensor, deviations: Tensor, unread: Tensor, count: int) -> bool:
    """Whether no unread row is likely to be among the best or the worst `count`, of scores on that side of zero."""
    for side in (estimate, -estimate):
        known = side[~unread].sort(descending=True).values
        if len(known) < count:
            return False
        if bool(((side + DEVIATIONS * deviations)[unread] > known[count - 1].clamp(min=0.0)).any()):
            return False
    return True


def _extremes(estimate: Tensor, deviations: Tensor, unread: Tensor, best: int, worst: int) -> Tensor:
    """Ascending positions of so many rows that may be highest and lowest, of those that are unread."""
    places = unread.nonzero().flatten()
    allowed = torch.where(deviations.isfinite(), deviations, 0.0)[places]
    up = (estimate[places] + allowed).argsort(descending=True, stable=True)[:best]
    down = (estimate[places] - allowed).argsort(stable=True)[:worst]
    return places[torch.cat([up, down]).unique()]
