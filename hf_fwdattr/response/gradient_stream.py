"""Per-row gradients of the training rows, batch by batch, shared by the ranks and shown on a progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..gradients.per_sample import PerSampleGradients
from ..models.fsdp import is_sharded
from ..models.likelihood import Batch, Objective
from ..models.parameters import TrackedParameters
from .dataset import TrainingRows, uniforms
from .distributed import SINGLE_PROCESS, Ranks
from .progress import progress_bar


__all__ = ["GradientStream"]


class GradientStream:
    """Stream the gradients of chosen rows at given weights; use inside `frozen(model)`.

    Args:
        model (`nn.Module`): in evaluation mode; its tracked weights are overwritten.
        parameters (`TrackedParameters`): the tracked parameters.
        objective (`Objective`): the likelihood.
        rows (`TrainingRows`): the training set, in batches whose gradients fit into memory.
        ranks (`Ranks`, *optional*): processes that share the rows; each has a stream with the same arguments.
        quiet (`bool`): no progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: TrackedParameters,
        objective: Objective,
        rows: TrainingRows,
        ranks: Ranks = SINGLE_PROCESS,
        quiet: bool = False,
    ):
        self.model, self.parameters, self.rows, self.ranks = model, parameters, rows, ranks
        self._gradients = PerSampleGradients(model, parameters, objective)
        self._quiet, self._sharded = quiet or ranks.rank > 0, is_sharded(model)
        self._bar, self._title = tqdm(disable=True), ""

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """Show one bar of `total` rows for all that is streamed inside the context."""
        with progress_bar(total=total, unit="row", disable=self._quiet) as self._bar:
            yield

    def by_columns(
        self,
        theta: Tensor,
        row_indices: Tensor,
        title: str,
        sampling_key: tuple[int, ...] | None = None,
        smoothing: float = 0.0,
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield gradients of all the rows in this rank's columns; every rank iterates to the end.

        Args:
            theta (`Tensor`): (P,) weights at which gradients are taken.
            row_indices (`Tensor`): (n,) rows, each once.
            title (`str`): of the progress bar.
            sampling_key (`tuple[int, ...]`, *optional*): with it, labels are sampled from the model by random numbers
                of this key; otherwise they are the data's own.
            smoothing (`float`): label smoothing.

        Yields:
            positions (m,) within `row_indices`, gradients (m, own columns) on the CPU, and the number of supervised
            positions in this rank's own part of the batch.
        """
        positions = torch.full((len(self.rows),), -1)
        positions[row_indices] = torch.arange(len(row_indices))
        batches = self.by_rows(theta, row_indices, title, sampling_key, smoothing)
        empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.parameters.size, dtype=theta.dtype), 0
        for _ in range(self._rounds(row_indices)):
            try:
                indices, gradients, supervised = next(batches, empty)
            except Exception:
                if self.ranks.size > 1:  # the others must not wait for this rank
                    self.ranks.report_failure(self.rows.batch_size)
                raise
            yield *self.ranks.exchange(positions[indices], gradients, self.rows.batch_size), supervised

    def by_rows(
        self,
        theta: Tensor,
        row_indices: Tensor,
        title: str,
        sampling_key: tuple[int, ...] | None = None,
        smoothing: float = 0.0,
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield gradients of this rank's part of the rows in all columns; arguments as of `by_columns`.

        Yields:
            row indices (m,), gradients (m, P) on the CPU, and the number of supervised positions.
        """
        self.parameters.write(self.model, theta)
        self.advance(title, 0)
        for indices, batch in self._batches(row_indices):
            count, labels, drawn = len(indices), batch["labels"], None
            if sampling_key is not None and count:
                drawn = uniforms(indices, int(labels[0].numel()), *sampling_key).to(labels.device)
            gradients, supervised = self._gradients(batch, drawn, smoothing)
            self._bar.update(count * self.ranks.size)
            yield indices, gradients[:count].to("cpu", theta.dtype), int(supervised[:count].sum())

    def advance(self, title: str, rows: int) -> None:
        """Show the phase, and that so many rows are done."""
        self._bar.set_description(title, refresh=title != self._title)  # each phase has its line in a log
        self._title = title
        self._bar.update(rows)

    def _rounds(self, row_indices: Tensor) -> int:
        """Return the number of batches of the rank with the most rows."""
        return self.rows.count(-(-len(row_indices) // self.ranks.size))

    def _batches(self, row_indices: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """Yield this rank's batches.

        The ranks run a sharded model together, so each gets as many batches: a rank without further rows repeats one
        that does not count. A batch that cannot be read fails on all ranks before any of them waits in the model.
        """
        batches = self.rows.batches(row_indices[self.ranks.rank :: self.ranks.size].tolist())
        if not self._sharded:
            yield from batches
            return
        spare: tuple[Tensor, Batch] | None = None
        for _ in range(self._rounds(row_indices)):
            with self.ranks.raise_on_all_ranks():
                current = next(batches, None) or spare
                if current is None:
                    current = torch.zeros(0, dtype=torch.int64), self.rows.batch([int(row_indices[0])])
            yield current
            one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in current[1].items()}
            spare = current[0][:0], one
