"""The plan of a bank's passes, known before they begin: rows to read, bytes to hold, time."""

from dataclasses import dataclass


__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Sizes of a bank's passes.

    Attributes:
        rows (`int`): N, training rows that were trained on.
        size (`int`): P.
        segment_rows (`list[int]`): rows that each segment saw.
        curvature_samples (`int`): M, sampled-label gradients per segment.
        sample_rows (`int`): m, rows whose responses are held whole, from which the directions are found.
        query_gradients (`int`): rows whose gradients are taken at the end.
        ranks (`int`): processes that share the passes.
        matrices (`int`): matrices of sample rows times P that are held together.
        captured (`int`): gradients that training took; then no row is read for its response.
        predictor_rows (`int`): rows that rank 0 reads to fit the gradient predictor, and to learn its errors.
        predictor_bytes (`int`): memory that the fit takes.
    """

    rows: int
    size: int
    segment_rows: list[int]
    curvature_samples: int
    sample_rows: int
    query_gradients: int
    ranks: int = 1
    matrices: int = 2
    captured: int = 0
    predictor_rows: int = 0
    predictor_bytes: int = 0

    @property
    def row_passes(self) -> int:
        """Rows that go forward and backward over all ranks, without the gradient predictor's.

        A row passes through the segments that saw it: once, if the run took one epoch.
        """
        return len(self.segment_rows) * self.curvature_samples + sum(self.segment_rows) + self.query_gradients

    @property
    def bytes(self) -> int:
        """Size of the large float32 matrices over all ranks: curvature samples, responses and pushes."""
        return 4 * self.size * (len(self.segment_rows) * self.curvature_samples + self.matrices * self.sample_rows)

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
        if self.captured:
            text += f", beside {self.captured:,} gradients that training took"
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
