"""The record of a run: row weights of every step, and a snapshot in the middle of every segment."""

import json
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..bank.files import write_atomically
from ..bank.schema import LONGEST_NOTE, MOST_NOTES
from ..bank.tensors import read_tensors, write_tensors
from ..errors import BankError, UnsupportedError
from ..response.captures import Captures
from ..response.horizon import ExplicitHorizon, Horizon, NaturalHorizon
from ..response.segment import Segment, Visits


__all__ = ["CAPTURES", "END_RECORD", "RECORD", "Record", "Snapshot", "captures_of"]

RECORD = "fwdattr-record"  # folder of the record in a checkpoint
END_RECORD = f"_{RECORD}"  # of that which a run ends with; a leading underscore is not uploaded with the model
CAPTURES = "captures"  # folder of captured gradients, within that of the run's end

logger = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """Tracked parameters and the optimizer's diagonal D after `step` steps, both (P,)."""

    step: int
    theta: Tensor
    diagonal: Tensor


@dataclass
class Record:
    """The record of a training run; small, because only tracked parameters are copied.

    Attributes:
        steps (`int`): planned length of the run in optimizer steps.
        segments (`int`): S.
        momentum, weight_decay (`float`): of the optimizer.
        rates (`list[float]`): learning rate of each step; 0 for a step that was skipped.
        clips (`list[float]`): factor by which clipping scaled each step's gradient; 1 for a step that was not clipped.
        rows, weights (`list[Tensor]`): per step, (n,) row indices and the weight of each row's summed loss.
        snapshots (`list[Snapshot]`): one per segment reached so far.
        total (`int`): rows of the training set; 0 if unknown.
        optimizer (`str`): kind of optimizer.
        first (`int`): steps taken before the record began; responses to them are unknown.
        smoothing (`float`): label smoothing of the training loss.
        end (`Snapshot`, *optional*): the parameters that the run ended with, or was saved with.
        notes (`list[str]`): what the checks of values found after the first step.
        run, resumed (`str`): random names of this run, and of the one that it resumes.
    """

    steps: int
    segments: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    rates: list[float] = field(default_factory=list)
    clips: list[float] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    total: int = 0
    optimizer: str = "none"
    first: int = 0
    smoothing: float = 0.0
    end: Snapshot | None = None
    notes: list[str] = field(default_factory=list)
    run: str = ""
    resumed: str = ""

    @property
    def taken(self) -> int:
        """Steps of the run so far, with those before the record began."""
        return self.first + len(self.rates)

    def continue_as(self, planned: "Record", size: int) -> None:
        """Take over the plan of the run that continues this record; it may be of another length, with other rates.

        Segments are divided anew. Snapshots that were taken stay, and the one with the checkpoint joins them.

        Args:
            planned (`Record`): an empty record of the run that continues.
            size (`int`): P, of the weights that it tracks.

        Raises:
            UnsupportedError: the run has other rows, weights or another optimizer.
        """
        if self.total != planned.total:
            raise UnsupportedError(
                f"the run began with {self.total} rows and is resumed with {planned.total}, so row indices do not "
                "fit. Resume with the same training set"
            )
        sizes = {len(snapshot.theta) for snapshot in (*self.snapshots, self.end) if snapshot is not None}
        if sizes - {size}:
            raise UnsupportedError(
                f"parameters: the run began with {sizes.pop()} tracked weights and is resumed with {size}, so their "
                "responses do not add up. Resume with the same `parameters`"
            )
        for name in ("optimizer", "momentum", "weight_decay"):
            old, new = getattr(self, name), getattr(planned, name)
            if old != new:
                raise UnsupportedError(
                    f"{name}: the run began with {old} and is resumed with {new}, and a bank knows one. Resume with "
                    "the same optimizer"
                )
        if self.steps != planned.steps and self.end is not None:
            self.snapshots.append(self.end)
        self.steps, self.end = planned.steps, None
        self.resumed, self.run = self.run, planned.run

    def bank_notes(self) -> list[str]:
        """Return the notes as a bank keeps them: not too many, and none too long."""
        notes = [note if len(note) <= LONGEST_NOTE else f"{note[: LONGEST_NOTE - 3]}..." for note in self.notes]
        if len(notes) > MOST_NOTES:
            notes[MOST_NOTES - 1 :] = [f"and {len(notes) - MOST_NOTES + 1} more"]
        return notes

    def bounds(self) -> list[tuple[int, int]]:
        """Return first step and end of each segment; fewer segments than asked for if the run is shorter."""
        steps = self.steps - self.first
        count = max(1, min(self.segments, steps))
        edges = [self.first + round(index * steps / count) for index in range(count + 1)]
        return list(pairwise(edges))

    def due(self, step: int) -> bool:
        """Return whether a snapshot is taken after this many steps: half-way through a segment."""
        return any(step == start + max(1, (end - start) // 2) for start, end in self.bounds())

    def add(self, rate: float, rows: Tensor, weights: Tensor, clip: float = 1.0) -> None:
        """Record one optimizer step."""
        self.rates.append(rate)
        self.clips.append(clip)
        self.rows.append(rows)
        self.weights.append(weights)

    def visits_since(self, step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return rows and weights of the steps from the `step`-th of this record on."""
        return self.rows[step:], self.weights[step:]

    def merge(self, everyone: list[tuple[list[Tensor], list[Tensor]]], step: int) -> None:
        """Put what all ranks saw, by `visits_since(step)`, in place of what this one did."""
        for own, index in ((self.rows, 0), (self.weights, 1)):
            own[step:] = [torch.cat(parts) for parts in zip(*(given[index] for given in everyone), strict=True)]

    def build(
        self, total: int, end: Snapshot, horizon: dict[str, float] | None = None, captures: Captures | None = None
    ) -> list[Segment]:
        """Return the segments of the run, for the passes.

        Args:
            total (`int`): number of training rows.
            end (`Snapshot`): the final parameters; its step may be earlier than the last (a best model loaded back).
            horizon (`dict`, *optional*): arguments of [`ExplicitHorizon`], which then replaces the run's own segments.
            captures (`Captures`, *optional*): the gradients that the steps took; see `fits`.

        Raises:
            UnsupportedError: no step with a learning rate was recorded.
        """
        if horizon is not None:
            explicit = ExplicitHorizon(**horizon)
            weights, steps, _ = self._sums(0, end.step, total, rates=False)
            return [Segment(end.theta, torch.ones_like(end.theta), explicit, weights / max(steps, 1.0))]
        segments = []
        for start, stop in self.bounds():
            stop = min(stop, end.step)
            if stop <= start:
                continue
            middle = self._nearest((start + stop) / 2, end)
            weights, tau, rates = self._sums(start, stop, total)
            if tau == 0.0:
                continue
            natural: Horizon = NaturalHorizon(tau / (1.0 - self.momentum))
            decay = self.weight_decay * rates / tau  # decay is not clipped
            segments.append(Segment(middle.theta, middle.diagonal, natural, weights / tau, decay))
            if captures is not None:
                segments[-1].visits = self._visits(start, stop, captures)
        if not segments:
            raise UnsupportedError(
                f"no optimizer step was recorded with a learning rate above zero (of {len(self.rates)} steps), so "
                "every response is zero. Train for at least one step"
            )
        return segments

    def fits(self, captures: Captures) -> bool:
        """Return whether these are the gradients of the record's visits, one for each, in their order.

        Those of a stream were captured by the rows' ids, of which indices keep the order.
        """
        steps, rows = self._moving_visits()
        if len(steps) != len(captures) or not torch.equal(steps, captures.steps):
            return False
        return torch.equal(*(given.unique(return_inverse=True)[1] for given in (rows, captures.rows)))

    def _moving_visits(self) -> tuple[Tensor, Tensor]:
        """Return step and row of every visit in steps that moved weights."""
        moving = [index for index, rate in enumerate(self.rates) if rate]
        counts = torch.tensor([len(self.rows[index]) for index in moving], dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        steps = torch.repeat_interleave(torch.tensor(moving, dtype=torch.int64) + self.first, counts)
        return steps, torch.cat([none, *(self.rows[index] for index in moving)])

    def _visits(self, start: int, stop: int, captures: Captures) -> Visits:
        """Return the visits of steps from `start` to before `stop`."""
        steps = slice(start - self.first, stop - self.first)
        rates, clips = (torch.tensor(values[steps], dtype=torch.float64) for values in (self.rates, self.clips))
        scaled = rates * clips / (1.0 - self.momentum)
        remaining = scaled.flip(0).cumsum(0).flip(0) - scaled
        edges = torch.searchsorted(captures.steps, torch.tensor([start, stop]))
        chosen = torch.arange(int(edges[0]), int(edges[1]))
        within = captures.steps[chosen] - start
        rows = self._moving_visits()[1][chosen]
        return Visits(rows, chosen, scaled[within], remaining[within])

    def _nearest(self, step: float, end: Snapshot) -> Snapshot:
        """Return the snapshot nearest to a step, or the end of the run; the later one of two as near."""
        return min((*self.snapshots, end), key=lambda snapshot: (abs(snapshot.step - step), -snapshot.step))

    def _sums(self, start: int, stop: int, total: int, rates: bool = True) -> tuple[Tensor, float, float]:
        """Return sums over steps: of rate x clip x weight (rows,), of rate x clip, and of the rate.

        A clipped gradient is a step of a smaller rate, for pushes and curvature alike. Without `rates` every rate
        counts as one.
        """
        weights, tau, rate_sum = torch.zeros(total, dtype=torch.float64), 0.0, 0.0
        for step in range(max(start - self.first, 0), min(stop - self.first, len(self.rates))):
            rate = self.rates[step] if rates else 1.0
            weights.index_add_(0, self.rows[step], rate * self.clips[step] * self.weights[step])
            tau += rate * self.clips[step]
            rate_sum += rate
        return weights, tau, rate_sum

    def save(self, folder: Path) -> None:
        """Write to `folder`, so that a resumed run continues the record.

        The size is four bytes per visit of a row, sixteen per step, eight per tracked parameter and snapshot.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = torch.cat(self.weights) if self.weights else torch.zeros(0, dtype=torch.float64)
        values, runs = torch.unique_consecutive(weights, return_counts=True)
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, dtype=torch.int64)
        tensors = {
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "clips": torch.tensor(self.clips, dtype=torch.float64),
            "counts": torch.tensor([len(rows) for rows in self.rows], dtype=torch.int32),
            "rows": rows.int() if len(rows) == 0 or int(rows.abs().max()) < 1 << 31 else rows,
            "weights": values,  # nearly always the same for all rows of a step
            "runs": runs.int(),
        }
        snapshots = [*self.snapshots, *([] if self.end is None else [self.end])]
        for index, snapshot in enumerate(snapshots):
            tensors |= {f"theta.{index}": snapshot.theta, f"diagonal.{index}": snapshot.diagonal}
        write_tensors(folder / "record.safetensors", tensors)
        settings = {
            "steps": self.steps, "segments": self.segments, "momentum": self.momentum,
            "weight_decay": self.weight_decay, "total": self.total, "optimizer": self.optimizer,
            "first": self.first, "smoothing": self.smoothing, "notes": self.notes, "run": self.run,
            "taken": len(self.rates), "ended": self.end is not None, "snapshots": [s.step for s in snapshots],
        }  # fmt: skip
        write_atomically(folder / "record.json", json.dumps(settings, indent=2).encode())

    def save_if_possible(self, folder: Path, training: bool) -> None:
        """Write to `folder`; once training has begun, a full disk costs a checkpoint's record and not the training."""
        try:
            self.save(folder)
        except OSError as error:
            if not training:
                raise
            logger.error("the record of this run could not be written to %s: %s", folder, error)

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Read a record that `save` wrote.

        Raises:
            BankError: the record is missing or incomplete.
        """
        if not (folder / "record.json").is_file() or not (folder / "record.safetensors").is_file():
            raise BankError(
                f"no record of a run in {folder}: it must contain record.json and record.safetensors. Give the folder "
                "'fwdattr-record' of a checkpoint, or '_fwdattr-record' of an output_dir"
            )
        settings = json.loads((folder / "record.json").read_text())
        tensors = read_tensors(folder / "record.safetensors")
        counts = tensors["counts"].tolist()
        steps, taken, ended = (settings.pop(name) for name in ("snapshots", "taken", "ended"))
        if taken != len(counts):
            raise BankError(
                f"the record in {folder} is incomplete: {taken} steps in record.json, {len(counts)} in "
                "record.safetensors. Use an earlier checkpoint's"
            )
        snapshots = [Snapshot(s, tensors[f"theta.{i}"], tensors[f"diagonal.{i}"]) for i, s in enumerate(steps)]
        weights = tensors["weights"].repeat_interleave(tensors["runs"])
        return cls(
            **settings,
            end=snapshots.pop() if ended else None,
            rates=tensors["rates"].tolist(),
            clips=tensors["clips"].tolist(),
            rows=list(tensors["rows"].long().split(counts)),
            weights=list(weights.split(counts)),
            snapshots=snapshots,
        )


def captures_of(record: Path) -> Path | None:
    """Return the folder of a run's captured gradients, given that of its record, at its end or in a checkpoint."""
    folders = (record / CAPTURES, record.absolute().parent.parent / END_RECORD / CAPTURES)
    return next((folder for folder in folders if folder.is_dir()), None)
