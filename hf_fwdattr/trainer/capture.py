"""Capture of rows' gradients in a run: whether it is possible, where they go, and what becomes of it when it fails.

A failure costs no training and no bank: the passes after training then take the gradients.
"""

import logging
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..errors import AttributionError, BankError, UnsupportedError
from ..gradients.capture import CapturedBatch, GradientCapture, unhooked_weights
from ..response.captures import FLOATS, CaptureFolder, Captures, CaptureWriter, bytes_per_visit, chosen_bits
from .build_context import BuildContext
from .record import Record


__all__ = ["TrainingCapture", "open_captures", "planned_rows"]

logger = logging.getLogger(__name__)
_COMPARED = 2  # steps that moved weights are compared in any case: in the first, LoRA's A has no gradient
_SHARE = 4  # of memory_budget: one part in so many may hold the gradients of a step
_LEAST_HELD = 1 << 28  # bytes of them that are held in any case


class TrainingCapture:
    """Captured gradients of one run, on this rank.

    Files are made at the first forward pass, when the run has been described.

    Args:
        context (`BuildContext`): what the bank will be built from.
        record (`Record`): of the run; with steps in it, the run resumes.
        model (`nn.Module`): as the loop calls it.
        weighed (`bool`): whether the optimizer divides numbers by their size.
        obstacle (`str`): why the tracked weights' gradients cannot be captured, if the trial batch showed it.

    Attributes:
        folder (`Path`, *optional*): where gradients go, on a disk that all ranks see; None for a temporary one.
        rows_per_step (`int`): rows that an optimizer step takes over all ranks.
        handles (`list`): of hooks in the model.
        failure (`str`): why nothing is captured; empty while it is.

    Raises:
        UnsupportedError: `capture="training"` and it is not possible; where the disk is too small, from the first
            forward pass.
    """

    def __init__(self, context: BuildContext, record: Record, model: nn.Module, weighed: bool, obstacle: str = ""):
        self.config, self.ranks, self.record, self._weighed = context.config, context.ranks, record, weighed
        self.folder: Path | None = None
        self.rows_per_step, self.handles, self._size = 1, list[Any](), context.parameters.size
        self._files: CaptureFolder | None = None
        self._writer: CaptureWriter | None = None
        self._is_said = False
        self._has_begun = record.taken > record.first
        self._rows, self._moved = 0, 0  # rows whose gradients are held, and steps that moved weights
        after = self.config.capture == "after"
        self.failure = "capture='after'" if after else obstacle or _obstacle(context, model)
        if self.failure and self.config.capture == "training":
            raise _not_captured(self.failure)
        if not self.failure:
            self._gradients = GradientCapture(context.model, context.parameters)
            self.handles = self._gradients.handles

    def begin(self, rows: int, compared: bool) -> CapturedBatch | None:
        """Capture a micro-batch whose forward pass begins; None where nothing is captured."""
        if self._writer is None and not self.failure:
            self._start()
        elif self._writer is None and not self._is_said:
            self._say(0)
        if self.failure:
            return None
        self._rows += rows
        held = 4 * self._rows * self._size
        if held > max(self.config.memory_budget // _SHARE, _LEAST_HELD):
            self._fail(f"the gradients of {self._rows} rows take {held / 2**30:.1f} GiB. Raise memory_budget")
            return None
        return self._gradients.begin(rows, compared or self._moved < _COMPARED)

    def end(self) -> None:
        """Note that a forward pass is over."""
        if not self.failure:
            self._gradients.end()

    def commit(self, step: int, batches: list[Any], factor: float) -> None:
        """Keep what a step took of its rows, times `factor`.

        Args:
            step (`int`): number of the step.
            batches (`list[MicroBatch]`): its micro-batches.
            factor (`float`): one over the gradient scaler's factor and the number of processes; 0 for a step that
                moves nothing, which is forgotten.
        """
        captured, self._rows = [batch.captured for batch in batches], 0
        for batch in batches:
            batch.captured = None
        if self.failure or self._writer is None:
            return
        try:
            self._gradients.refuse_other_totals([one for one in captured if one is not None])
            if self._gradients.failure:
                raise UnsupportedError(self._gradients.failure)
            if not factor:
                return
            self._moved += 1
            for batch, one in zip(batches, captured, strict=True):
                gradients = None if one is None else one.gradients
                if gradients is None:
                    raise UnsupportedError("a micro-batch had no backward pass")
                self._writer.add(step, batch.row_indices.cpu().reshape(-1), gradients.cpu() * factor)
            self._has_begun = True
        except (OSError, AttributionError, RuntimeError) as error:
            self._fail(str(error))

    def flush(self) -> None:
        """Have all that is captured on disk, before a checkpoint says so."""
        if not self.failure and self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._fail(str(error))

    def close(self) -> Path | None:
        """End the capture; return its folder, or None where the passes have to take gradients. Collective."""
        if not self.failure:
            self._gradients.give_up("training has ended")
            try:
                if self._writer is not None:
                    self._writer.write()
            except OSError as error:
                self._fail(str(error))
        failures = [text for text in self.ranks.objects(self.failure) if text]
        if failures:
            self.remove()
        return None if failures else self.folder

    def remove(self) -> None:
        """Remove what was captured."""
        if self._files is not None and self.ranks.rank == 0:
            self._files.remove()

    def abandon(self) -> None:
        """End the capture of a recording that has ended with an error."""
        if not self.failure:
            self._stop("the recording has ended")

    def _start(self) -> None:
        """Make the folder, or continue that of the run which is resumed. Collective."""
        reason, visits = "", self.record.steps * self.rows_per_step
        if self.folder is None:
            temporary = tempfile.mkdtemp(prefix="fwdattr-") if self.ranks.rank == 0 else ""
            self.folder = Path(self.ranks.objects(temporary)[0])
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        with self.ranks.raise_on_all_ranks():
            if self.ranks.rank == 0:
                resumed = self.record.taken > self.record.first
                make = _continue if resumed else _create
                reason = make(self.folder, self.record, self._size, visits)
        reason = str(self.ranks.objects(reason)[0])
        if not reason:
            try:
                self._files = CaptureFolder.open(self.folder)
                self._writer = CaptureWriter(self._files, self.ranks.rank, self._weighed)
            except (BankError, OSError) as error:  # the folder of rank 0 is not seen by this one, for one
                reason = str(error)
        reason = next((text for text in self.ranks.objects(reason) if text), "")
        if reason:
            self._writer = None
            self._stop(reason)
            if self.config.capture == "training":
                raise _not_captured(reason)
        self._say(visits)

    def _say(self, visits: int) -> None:
        self._is_said = True
        if self.config.quiet or self.config.capture == "after" or self.ranks.rank > 0:
            return
        if self._writer is None:
            text = f"the passes after training take the rows' gradients: {self.failure}"
        else:
            bits = self._writer.folder.bits
            form = "in floats" if bits == FLOATS else f"in {bits} bits a number"
            total = bytes_per_visit(self._size, bits) * visits / 2**20
            text = (
                f"rows' gradients are captured while training, {form}: {total:,.0f} MiB in {self.folder}, until the "
                "bank is written"
            )
        tqdm.write(f"response bank: {text}", file=sys.stderr)

    def _fail(self, reason: str) -> None:
        """Capture no more; the passes after training will do, unless that is not wanted.

        Raises:
            UnsupportedError: `capture="training"`, and no step was captured yet.
        """
        self._stop(reason)
        if self.config.capture == "training" and not self._has_begun:
            raise _not_captured(reason)
        logger.warning(
            "rows' gradients are no longer captured: %s. The passes after training take them instead, in their time",
            reason.rstrip("."),
        )  # fmt: skip

    def _stop(self, reason: str) -> None:
        self.failure = reason
        self._gradients.give_up(reason)
        if self._files is not None:
            self._files.remove()


def _not_captured(reason: str) -> UnsupportedError:
    return UnsupportedError(f"capture='training': {reason.rstrip('.')}. Set capture='auto'")


def open_captures(folder: Path | None, record: Record) -> Captures | None:
    """Return the captured gradients of a run; None, with a warning, where there are none or of another run."""
    if folder is None or not folder.is_dir():
        return None
    try:
        captures = Captures(CaptureFolder.open(folder), record.taken)
    except (BankError, OSError) as error:
        logger.warning("%s. The passes take the rows' gradients instead", error)
        return None
    if not captures.folder.continues(record.run, record.taken) or not record.fits(captures):
        logger.warning(
            "%s holds the captured gradients of other steps than the record. The passes take them instead", folder
        )
        return None
    return captures


def _obstacle(context: BuildContext, model: nn.Module) -> str:
    """Return why gradients cannot be captured in this training; empty if they can."""
    others = unhooked_weights(context.model, context.parameters)
    if context.config.horizon is not None:
        return "with a horizon of your own there are no steps to capture"
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in context.model.modules()) or any(
        hasattr(module, "_orig_mod") for module in model.modules()
    ):
        return "the model is compiled, and hooks would be compiled with it"
    if others:
        return f"{others[0]} is not the weight of one Linear layer alone"
    return ""


def planned_rows(accelerator: Any, loader: Any, processes: int) -> int:
    """Return how many rows an optimizer step takes over all ranks, as far as loader and accelerator tell."""
    batch = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None) or 1
    return int(batch) * getattr(accelerator, "gradient_accumulation_steps", 1) * processes


def _create(folder: Path, record: Record, size: int, visits: int) -> str:
    """Make the folder; return why there is no room for it."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    bits = chosen_bits(size, visits, free)
    if not bits:
        return (
            f"{visits:,} gradients of {size:,} numbers take {bytes_per_visit(size, 1) * visits / 2**30:.1f} GiB in "
            f"one bit a number, and half of the {free / 2**30:.1f} GiB that are free in {existing} are left alone"
        )
    CaptureFolder(folder, size, bits, ((record.run, record.first),)).create()
    return ""


def _continue(folder: Path, record: Record, *_: int) -> str:
    """Cut captured gradients back to the record of the checkpoint; return why they do not fit it."""
    try:
        files = CaptureFolder.open(folder)
        if files.continues(record.resumed, record.taken) and record.fits(Captures(files, record.taken)):
            files.resume(record.resumed, record.taken, record.run)
            return ""
    except (BankError, OSError):
        pass
    return (
        f"the gradients that were captured before step {record.taken} are not in {folder}: that run has ended, had "
        "another output_dir, or captured none"
    )
