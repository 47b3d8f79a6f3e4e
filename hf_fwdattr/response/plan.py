"""What the passes will take, known before they begin: rows to read, bytes to hold, time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of a bank's passes.

    Attributes:
        rows (`int`): N, rows of the training set that were seen.
        size (`int`): P.
        segments (`int`): S.
        samples (`int`): M, sampled-label gradients per segment.
        chosen (`int`): m, rows whose responses are kept whole, from which the directions are found.
        query_gradients (`bool`): whether gradients at the end are taken; an exact bank needs none.
        ranks (`int`): processes that share it.
        look (`int`): rows that one rank reads after that, to fit and judge the first look, and to learn how its errors
            go together.
        look_bytes (`int`): what the fit holds in memory.
        means (`bool`): whether responses are means over several ends, which is one more matrix.
    """

    rows: int
    size: int
    segments: int
    samples: int
    chosen: int
    query_gradients: bool = True
    ranks: int = 1
    look: int = 0
    look_bytes: int = 0
    means: bool = False

    @property
    def row_passes(self) -> int:
        """Rows that go forward and backward, over all ranks: at most (2 S + 1) N where M is at most N; the first look
        aside.
        """
        others = max(self.rows - self.chosen, 0)
        once = self.chosen if self.query_gradients else 0
        return self.segments * (self.samples + self.chosen + others) + once

    @property
    def bytes(self) -> int:
        """Of the large matrices, over all ranks, in float32: curvature samples, responses and pushes."""
        return 4 * self.size * (self.segments * self.samples + (2 + self.means) * self.chosen)

    def summary(self, budget: int, pace: float | None = None) -> str:
        """The plan in one line.

        Args:
            budget (`int`): bytes that a rank may hold in memory.
            pace (`float`, *optional*): seconds per row of forward and backward on one rank, as training took them.
        """
        each = self.bytes // self.ranks
        spilled = max(0, each - budget)
        held = min(each, budget) + self.look_bytes
        where = f"{_bytes(held)} in memory" + (f", {_bytes(spilled)} on disk" if spilled else "")
        total = self.row_passes + self.look
        text = (
            f"{total:,} rows forward and backward ({total / max(self.rows, 1):.1f} times the {self.rows:,} trained on"
            + (f", {self.look:,} of them for the first look" if self.look else "")
            + f"), {where}"
        )
        if self.ranks > 1:
            text += f" on each of {self.ranks} ranks"
        if pace is not None:
            text += f", about {_duration(pace * (self.row_passes / self.ranks + self.look))} at training's speed"
        return text


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
