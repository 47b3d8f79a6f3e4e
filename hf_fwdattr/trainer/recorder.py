"""The recorder of a fine-tune: what the callback does, without the Trainer."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import BankError
from ..models.likelihood import resolve_objective
from ..models.parameters import TrackedParameters
from ..response.distributed import Ranks
from .accelerators import refuse_accelerator
from .build import refuse_unsupported, respond
from .build_context import BuildContext
from .capture import TrainingCapture, planned_rows
from .clipping import ClippingRecorder
from .guard import Guard
from .optimizer import Preconditioner, warn_of_untracked
from .patching import Patches
from .record import Record, Snapshot
from .row_weights import BatchRecorder, OptimizerStep, base_loader, is_stream
from .step_checks import LoopChecks, StepCheck
from .streams import first_rows, read_again
from .value_checks import LossCheck


__all__ = ["ResponseRecorder"]

logger = logging.getLogger(__name__)
_PENDING = 64  # steps whose numbers may stay on the device before they are read


class ResponseRecorder:
    """Record a fine-tune in a training loop over Accelerate, and make its response bank.

    Three calls: make a recorder when model, optimizer and dataloader are prepared; `step()` right after every
    `optimizer.step()`; `finish(folder)` when training is done. Under several processes every rank makes every call.

    ```python
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    recorder = ResponseRecorder(
        config, accelerator=accelerator, model=model, optimizer=optimizer, dataloader=loader, steps=steps
    )
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                recorder.step()
                scheduler.step()
                optimizer.zero_grad()
    bank = recorder.finish(folder / "fwdattr")
    accelerator.unwrap_model(model).save_pretrained(folder)
    ```

    The loop must call the model with the batches of its dataloader, train on the loss that the model returns for
    `labels` (scaled by any factor), and clip, if at all, by `accelerator.clip_grad_norm_`. Steps that were taken
    before without a record, and a loss with smoothed labels, are stated with [`~ResponseRecorder.describe_run`].

    **Resuming, and failures.** `save(folder)` writes the record beside a checkpoint; `resume=folder` continues it, and
    the bank is that of an uninterrupted run (tell `describe_run` where captured gradients are kept). After
    `end(folder)` the record is on disk, and `build_bank(model, dataset, config, record=folder)` completes the bank
    should the passes fail.

    Args:
        config (`ResponseConfig`, *optional*): settings.
        accelerator (`Accelerator`): the loop's.
        model, optimizer, dataloader: as `accelerator.prepare` returned them.
        steps (`int`): planned optimizer steps; the run is divided into segments by it.
        dataset (*optional*): the training set with its row-id and source columns, if the dataloader's lacks them.
        processing_class (*optional*): the tokenizer, identified in the bank by its hash.
        resume (`str` or `Path`, *optional*): folder of the record that `save` wrote with the checkpoint from which the
            loop continues.

    Raises:
        UnsupportedError: before the first step: an optimizer that is not supported, a dataset without random
            access or `row_id_column`, a random collator, FSDP1, tensor parallelism; from `step()`: a loss that is not
            the model's own or weighs tokens unequally; from the clipping: values clipped, or parameters clipped apart.
    """

    def __init__(
        self,
        config: ResponseConfig | None = None,
        *,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        dataloader: Any,
        steps: int,
        dataset: Any = None,
        processing_class: Any = None,
        resume: str | Path | None = None,
    ):
        refuse_accelerator(accelerator)
        self.config, self.ranks, self.tokenizer = config or ResponseConfig(), Ranks.of_run(), processing_class
        self.model = model if accelerator is None else accelerator.unwrap_model(model, keep_torch_compile=False)
        self.parameters = TrackedParameters.of(self.model, self.config.parameters, sharded=True)
        self.preconditioner = Preconditioner.of(optimizer, self.model, self.parameters)
        if self.config.parameters == "auto" and self.ranks.rank == 0:
            warn_of_untracked(optimizer, self.model, self.parameters)
        self._accelerator, self._scaler = accelerator, getattr(optimizer, "scaler", None)
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        loader = base_loader(dataloader, self.config.row_id_column)
        self.original: Any = loader.dataset if dataset is None else dataset
        self.rows: Any = None if is_stream(loader) else loader.dataset  # of a stream, known when it was read
        with self.ranks.raise_on_all_ranks():
            first = first_rows(self.original, self.config.batch_size) if self.rows is None else None
            rows, original = (self.rows, self.original) if first is None else (first, first)
            context = self._context(rows, loader.collate_fn, original)
            obstacle = refuse_unsupported(context)
        self.record = self._resumed(Path(resume), steps) if resume is not None else self._new_record(steps)
        self.capture = TrainingCapture(context, self.record, model, self.preconditioner.kind != "sgd", obstacle)
        self.capture.rows_per_step = planned_rows(accelerator, loader, self.ranks.size)
        self._attach(model, loader)
        self._pending: list[OptimizerStep] = []
        self._rate: float | None = None
        self._loss_gradient: float | None = None
        self._loss_scale = 1.0
        self._merged, self._count = len(self.record.rates), self.record.taken
        self._moved, self._owes_snapshot = any(self.record.rates), False
        self._captured: Path | None = None
        self._began, self._seconds, self._visits = time.perf_counter(), 0.0, 0

    def _attach(self, model: nn.Module, loader: Any) -> None:
        """Patch the loop's objects; `detach` undoes it."""
        self._processes = 1 if self._accelerator is None else self._accelerator.num_processes
        self._patches, self._row_patches, self.guard = Patches(), Patches(), Guard(self.ranks)
        objective, tracked = resolve_objective(self.model, self.config.objective), self.parameters.tensors(self.model)
        named = dict(zip(self.parameters.names, tracked, strict=True))
        step_check = StepCheck(self._optimizer, self.preconditioner, named)
        self.checks = LoopChecks(LossCheck(self.model, objective), step_check, self.guard, self._note, self.ranks)
        self.batches = BatchRecorder(
            model, loader, self._row_patches, objective.shifts_labels, self.config.row_id_column, self.checks,
            self.guard, self.capture,
        )  # fmt: skip
        self._patches.hook(*self.capture.handles)
        self._clipping: ClippingRecorder | None = None
        if self._accelerator is not None:
            self._clipping = ClippingRecorder(self._accelerator, tracked, self._patches, self.guard)
        self.checks.attach(self._accelerator, self._processes, self._patches)
        before, after = self._optimizer.register_step_pre_hook, self._optimizer.register_step_post_hook
        self._patches.hook(before(self._before_step), after(self._after_step))

    def _note(self, message: str) -> None:
        """Note and warn of what the checks found after the first step."""
        self.record.notes.append(message)
        logger.warning("scores from this training may be wrong: %s", message)

    def _new_record(self, steps: int) -> Record:
        optimizer, total = self.preconditioner, 0 if self.rows is None else len(self.rows)
        settings = (steps, self.config.segments, optimizer.momentum, optimizer.weight_decay)
        name = self.ranks.objects(uuid4().hex)[0]
        return Record(*settings, total=total, optimizer=optimizer.kind, run=name)

    def _resumed(self, folder: Path, steps: int) -> Record:
        """Return the record that rank 0 reads from the folder."""
        with self.ranks.raise_on_all_ranks():
            loaded = Record.load(folder) if self.ranks.rank == 0 else None
        record: Record = self.ranks.objects(loaded)[0]
        record.continue_as(self._new_record(steps), self.parameters.size)
        return record

    def describe_run(
        self,
        *,
        steps_taken: int = 0,
        label_smoothing: float = 0.0,
        loss_gradient: float | None = None,
        captures: str | Path | None = None,
        rows_per_step: int | None = None,
    ) -> None:
        """State facts of the run that its objects do not show; to be called before the first step.

        Args:
            steps_taken (`int`): optimizer steps taken before; if there is no record of them, the bank holds responses
                to the later steps only.
            label_smoothing (`float`): label smoothing of a training loss that the loop computes from the logits.
            loss_gradient (`float`, *optional*): with such a loss, the factor that takes the place of the gradient
                measured at the model's own loss: 1 for a sum over tokens divided by `num_items_in_batch`.
            captures (`str` or `Path`, *optional*): folder for rows' gradients while the loop runs, on a disk that all
                ranks see; a run that resumes needs the same one. By default a temporary one.
            rows_per_step (`int`, *optional*): rows that an optimizer step takes over all ranks, from which that
                folder's size is planned; by default those of a batch, times processes and Accelerate's accumulation.

        Raises:
            BankError: the resumed record has another number of steps.
        """
        if self.record.taken == 0:
            self.record.first = steps_taken
        elif steps_taken and self.record.taken != steps_taken:
            self.detach()
            raise BankError(
                f"the record has {self.record.taken} steps and training resumes after {steps_taken}. Resume from the "
                "checkpoint that the record belongs to"
            )
        self._count = self.record.taken
        self.record.smoothing, self._loss_gradient = label_smoothing, loss_gradient
        if captures is not None:
            self.capture.folder = Path(captures)
        self.capture.rows_per_step = rows_per_step or self.capture.rows_per_step

    def step(self) -> None:
        """Record the optimizer step that was just taken; does nothing where the optimizer only accumulates.

        After the first one nothing is raised: what goes wrong ends the recording, and `finish` raises it.
        """
        loop = self._accelerator  # it says that a step was skipped until the next one, also while it accumulates
        skipped = loop is not None and loop.sync_gradients and loop.optimizer_step_was_skipped
        if self._rate is None and not skipped:
            return
        self._moved |= bool(self._rate)
        self._count += 1
        with self.guard.first():
            if self.guard.error is None:
                self._record_step()
        self._owes_snapshot |= self.record.due(self._count)
        if self._owes_snapshot and self._moved:  # before the first step that moves weights the optimizer has no state
            self._owes_snapshot = False
            with self.guard():
                self._agree()  # that all ranks go on, as a snapshot may be collective
                self.record.snapshots.append(self.snapshot(self._count))
        self._rate, self.guard.training = None, True
        if self.guard.error is not None:
            self.capture.abandon()
        if self.guard.error is not None and self.ranks.size == 1:
            self._patches.undo()  # the row patches stay, as batches with row indices are under way

    def _record_step(self) -> None:
        step = OptimizerStep(self._rate or 0.0, self.batches.take(), loss_scale=self._loss_scale)
        if self._clipping is not None:
            clip = self._clipping.take()
            step.clip = clip if step.rate else 1.0
        self._visits += sum(micro.row_indices.numel() for micro in step.micro_batches)
        factor = 1.0 / (step.loss_scale * self._processes) if step.rate else 0.0
        self.capture.commit(self.taken, step.micro_batches, factor)
        self._pending.append(step)
        if len(self._pending) >= _PENDING or self.taken <= self.record.first + 1:  # refuse a wrong loss at once
            self._finalize_pending()

    def _agree(self) -> None:
        """Raise on all ranks the error with which one of them stopped recording."""
        with self.ranks.raise_on_all_ranks():
            self.guard.raise_kept()

    @property
    def taken(self) -> int:
        """Optimizer steps so far."""
        return self.record.taken + len(self._pending)

    def _before_step(self, *_: Any) -> None:
        with self.guard():
            self._rate = self.preconditioner.learning_rate(self._optimizer)
            if self._scaler is not None:  # it changes its scale after the step
                self._loss_scale = self._scaler.get_scale()
            if self.guard.error is None:
                self.checks.before_step(1.0 if self._clipping is None else self._clipping.factor, self._loss_scale)

    def _after_step(self, *_: Any) -> None:
        with self.guard():
            self.checks.after_step()

    def _finalize_pending(self) -> None:
        for step in self._pending:
            self.record.add(*step.with_known_rows().finalize(self._processes, self._loss_gradient))
        self._pending = []

    def _merge(self) -> None:
        """Complete every rank's record with the rows that the others saw since the last time."""
        self._agree()
        with self.ranks.raise_on_all_ranks():
            self._finalize_pending()
        self.record.merge(self.ranks.objects(self.record.visits_since(self._merged)), self._merged)
        self._merged = len(self.record.rates)

    def snapshot(self, step: int) -> Snapshot:
        """Return tracked parameters and the optimizer's diagonal now; collective, as either may be sharded."""
        theta = self.parameters.read(self.model).cpu()
        return Snapshot(step, theta, self.preconditioner.diagonal(self._optimizer, self.model, self.parameters))

    def save(self, folder: str | Path) -> None:
        """Write the record beside a checkpoint, so that a run that resumes from it ends with the same bank."""
        with self.guard():
            self.capture.flush()
            self._merge()
            end = self.snapshot(self.taken)
            with self.ranks.raise_on_all_ranks():
                if self.ranks.rank == 0:
                    replace(self.record, end=end).save_if_possible(Path(folder), self.guard.training)

    def detach(self) -> None:
        """Leave model, dataloader, optimizer and accelerator as they were found."""
        self._patches.undo()
        self._row_patches.undo()

    def end(self, folder: str | Path | None = None, until: int | None = None) -> None:
        """End the record; `finish` calls this by itself.

        Args:
            folder (`str` or `Path`, *optional*): where the record is written, for [`build_bank`] should the passes
                fail.
            until (`int`, *optional*): the step of which the weights are, if not the last (a best model loaded back).
        """
        self.detach()
        self._seconds = time.perf_counter() - self._began
        self._captured = self.capture.close()
        self._merge()
        if self.rows is None:
            with self.ranks.raise_on_all_ranks():
                self._again, self.record.rows = read_again(self.original, self.config.row_id_column, self.record.rows)
            self.rows = self.original = self._again.dataset
            self.record.total = len(self.rows)
        self.record.end = self.snapshot(until or self.taken)
        with self.ranks.raise_on_all_ranks():
            if folder is not None and self.ranks.rank == 0:
                self.record.save(Path(folder))

    def finish(self, folder: str | Path) -> ResponseBank:
        """Make the passes over the training set, write the bank into the folder and open it.

        Args:
            folder (`str` or `Path`): the bank's own, `<folder of the model>/fwdattr`; on a disk that all ranks see.

        Raises:
            NumericalError: the trained weights or a gradient are not finite.
        """
        if self.record.end is None:
            self.end()
        assert self.record.end is not None
        seconds_per_row = self._seconds / self._visits if self._visits else None
        context = self._context(self.rows, self.batches.collate, self.original, seconds_per_row)
        bank = respond(context, self.record, self.record.end, Path(folder), self._captured)
        self.capture.remove()
        return bank

    def _context(self, dataset: Any, collate: Any, original: Any, seconds: float | None = None) -> BuildContext:
        return BuildContext(
            self.model, self.parameters, self.config, dataset, collate, original, self.tokenizer, self.ranks, seconds
        )
