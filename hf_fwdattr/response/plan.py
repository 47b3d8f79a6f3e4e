"""The plan of a bank's passes, known before they begin: rows to read, bytes to hold, time."""

from dataclasses import dataclass


__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Sizes of a bank's passes.

    Attributes:
        rows (`int`): N, training rows that were trained on.
        size (`int`): P.
        segments (`int`): S.
        curvature_samples (`int`): M, sampled-label gradients per segment.
        sample_rows (`int`): m, rows whose responses are held whole, from which the directions are found.
        query_gradients (`bool`): whether gradients at the end are taken; an exact bank needs none.
        ranks (`int`): processes that share the passes.
        predictor_rows (`int`): rows that rank 0 reads afterwards to fit and judge the gradient predictor.
        predictor_bytes (`int`): memory that the fit takes.
        averaged (`bool`): whether responses are averaged over the run, which takes one more matrix.
    """

    rows: int
    size: int
    segments: int
    curvature_samples: int
    sample_rows: int
    query_gradients: bool = True
    ranks: int = 1
    predictor_rows: int = 0
    predictor_bytes: int = 0
    averaged: bool = False

    @property
    def row_passes(self) -> int:
        """Rows that go forward and backward over all ranks, without the gradient predictor's.

        At most (2 S + 1) N where M is at most N.
        """
        others = max(self.rows - self.sample_rows, 0)
        once = self.sample_rows if self.query_gradients else 0
        return self.segments * (self.curvature_samples + self.sample_rows + others) + once

    @property
    def bytes(self) -> int:
        """Size of the large float32 matrices over all ranks: curvature samples, responses and pushes."""
        return 4 * self.size * (self.segments * self.curvature_samples + (2 + self.averaged) * self.sample_rows)

    def summary(self, budget: int, seconds_per_row: float | None = None) -> str:
        """Return the plan in one line.

        Args:
            budget (`int`): bytes that a rank may hold in memory.
            seconds_per_row (`float`, *optional*): time of forward and backward on one rank, as training took it.
        """
        bytes_per_rank = self.bytes // self.ranks
        on_disk = max(0, bytes_per_rank - budget)
        in_memory = min(bytes_per_rank, budget) + self.predictor_bytes
        total = self.row_passes + self.predictor_rows
        text = (
            f"{total:,} rows forward and backward ({total / max(self.rows, 1):.1f} times the {self.rows:,} trained on"
        )
        if self.predictor_rows:
            text += f", {self.predictor_rows:,} of them for the gradient predictor"
        text += f"), {_bytes(in_memory)} in memory" + (f", {_bytes(on_disk)} on disk" if on_disk else "")
        if self.ranks > 1:
            text += f" on each of {self.ranks} ranks"
        if seconds_per_row is not None:
            seconds = seconds_per_row * (self.row_passes / self.ranks + self.predictor_rows)
            text += f", about {_duration(seconds)} at training's speed"
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
