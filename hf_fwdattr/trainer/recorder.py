"""What the callback does, without the Trainer: three calls around a training loop of one's own."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import BankError, UnsupportedError
from ..models.likelihood import resolve_objective
from ..models.parameters import Parameters
from ..response.distributed import Ranks
from .build import check, respond
from .clipping import Clipping
from .optimizer import Preconditioner
from .record import Record, Snapshot
from .row_weights import BatchRecorder, Step, loader_of, streams
from .streams import KeptRows, first_rows


_SETTLE = 64  # steps whose numbers may stay on the device before they are read


class ResponseRecorder:
    """Records a fine-tune in a loop of one's own over Accelerate, and makes its response bank.

    Three calls: make one when model, optimizer and dataloader are prepared; `step()` right after every
    `optimizer.step()`; `finish(folder)` when training is done. The loop must train on the loss that the model returns
    for `labels` (however scaled), and clip, if at all, by `accelerator.clip_grad_norm_`. Under several processes every
    rank makes every call.

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

    Args:
        config (`ResponseConfig`, *optional*): settings.
        accelerator (`Accelerator`): the loop's.
        model, optimizer, dataloader: as `accelerator.prepare` returned them.
        steps (`int`): optimizer steps that are planned; segments are cut from it.
        dataset (*optional*): the training set with its row-id and source columns, if the dataloader's lacks them.
        processing_class (*optional*): the tokenizer, to be known by its hash.
        resume (`str` or `Path`, *optional*): folder that `save` wrote when the checkpoint was made from which the loop
            now goes on.
        begun (`int`): steps that were taken before, of which there may be no record.

    Raises:
        UnsupportedError: before the first step, for whatever the mathematics does not cover.
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
        begun: int = 0,
        _smoothing: float = 0.0,
        _rule: float | None = None,
    ):
        _refuse(accelerator)
        self.config = config or ResponseConfig()
        self.ranks = Ranks.of_run()
        self.model = model if accelerator is None else accelerator.unwrap_model(model, keep_torch_compile=False)
        self.parameters = Parameters.of(self.model, self.config.parameters, sharded=True)
        self.preconditioner = Preconditioner.of(optimizer, self.model, self.parameters)
        self._accelerator, self._rule, self.tokenizer = accelerator, _rule, processing_class
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._scaler = getattr(optimizer, "scaler", None)
        column = self.config.row_id_column
        loader = loader_of(dataloader, column)
        found: Any = loader.dataset
        self.original = found if dataset is None else dataset
        self.rows = None if streams(loader) else found  # of a stream, known only when it was read
        total = 0 if self.rows is None else len(self.rows)
        if self.rows is None:
            some = first_rows(self.original, self.config.batch_size)
            check(self.model, some, loader.collate_fn, self.config, some)
        else:
            check(self.model, self.rows, loader.collate_fn, self.config, self.original)
        self.record = self._begin(resume, steps, begun, total, _smoothing)
        shifted = resolve_objective(self.model, self.config.objective).name == "causal-lm"
        self.exposure = BatchRecorder(model, loader, shifted, column)
        live = self.parameters.tensors(self.model)
        self._clipping = None if accelerator is None else Clipping(accelerator, live)
        self._hook = self._optimizer.register_step_pre_hook(self._about_to_step)
        self._rate: float | None = None
        self._unscale, self._detached = 1.0, False
        self._pending: list[Step] = []
        self._merged = len(self.record.rates)
        self._moved, self._owed = any(self.record.rates), False
        self._began, self._visits = time.perf_counter(), 0

    def _begin(self, resume: str | Path | None, steps: int, begun: int, total: int, smoothing: float) -> Record:
        """A fresh record, or the one that rank 0 finds in the folder."""
        seen = self.preconditioner
        if resume is None:
            return Record(
                steps, self.config.segments, seen.momentum, seen.weight_decay, total=total, optimizer=seen.kind,
                first=begun, smoothing=smoothing,
            )  # fmt: skip
        with self.ranks.raise_on_all_ranks():
            loaded = Record.load(Path(resume)) if self.ranks.rank == 0 else None
        record: Record = self.ranks.objects(loaded)[0]
        record.end = None
        if record.steps != steps:
            raise UnsupportedError(f"the run was planned for {record.steps} steps and now for {steps}")
        if record.total != total:
            raise UnsupportedError(f"the run began with {record.total} rows and is resumed with {total}")
        if begun and record.taken != begun:
            raise BankError(f"the record in {resume} is of {record.taken} steps and training resumes after {begun}")
        return record

    def step(self) -> None:
        """Note the step that was just taken; does nothing where the optimizer only accumulates."""
        loop = self._accelerator  # which says that a step was skipped until the next one, also while it accumulates
        skipped = loop is not None and loop.sync_gradients and loop.optimizer_step_was_skipped
        if self._rate is None and not skipped:
            return
        self._moved |= self._rate is not None
        step = Step(0.0 if self._rate is None else self._rate, self.exposure.take(), unscale=self._unscale)
        if self._clipping is not None:
            clip = self._clipping.take()
            step.clip = clip if step.rate else 1.0
        self._rate = None
        self._visits += sum(micro.rows.numel() for micro in step.micro)
        self._pending.append(step)
        if len(self._pending) >= _SETTLE or self.taken <= self.record.first + 1:  # the first: to complain at once
            self._settle()
        self._owed |= self.record.due(self.taken)
        if self._owed and self._moved:  # before the first step that is not skipped, the optimizer has no state
            self._owed = False
            self.record.snapshots.append(self.snapshot(self.taken))

    @property
    def taken(self) -> int:
        """Optimizer steps so far."""
        return self.record.taken + len(self._pending)

    def _about_to_step(self, *_: Any) -> None:
        self._rate = self.preconditioner.learning_rate(self._optimizer)
        if self._scaler is not None:  # which changes its scale after the step
            self._unscale = self._scaler.get_scale()

    def _settle(self) -> None:
        ranks = 1 if self._accelerator is None else self._accelerator.num_processes
        for step in self._pending:
            if not step.micro:
                raise UnsupportedError(
                    "the model was not called with the batches of the dataloader (a trainer that makes its own of "
                    "them, as DPO does of pairs), so nobody knows which rows this step saw"
                )
            rate, rows, weights, clip = step.finalize(ranks, self._rule)
            self.record.add(rate, rows, weights, clip)
        self._pending = []

    def _merge(self) -> None:
        """Make every rank's record whole: the rows that each saw since the last time, put together."""
        with self.ranks.raise_on_all_ranks():
            self._settle()
        new = slice(self._merged, None)
        everyone = self.ranks.objects((self.record.rows[new], self.record.weights[new]))
        if self.ranks.size > 1:
            self.record.rows[new] = [torch.cat(parts) for parts in zip(*(rows for rows, _ in everyone), strict=True)]
            self.record.weights[new] = [torch.cat(parts) for parts in zip(*(w for _, w in everyone), strict=True)]
        self._merged = len(self.record.rates)

    def snapshot(self, step: int) -> Snapshot:
        """What responds, and the optimizer's diagonal, now; every rank calls it, as either may be sharded."""
        theta = self.parameters.read(self.model).cpu()
        return Snapshot(step, theta, self.preconditioner.diagonal(self._optimizer, self.model, self.parameters))

    def save(self, folder: str | Path) -> None:
        """Put the record beside a checkpoint, so that a run that resumes from it ends with the same bank."""
        self._merge()
        end = self.snapshot(self.taken)
        with self.ranks.raise_on_all_ranks():
            if self.ranks.rank == 0:
                replace(self.record, end=end).save(Path(folder))

    def detach(self) -> None:
        """Leave model, dataloader, optimizer and accelerator as they were found; once."""
        if self._detached:
            return
        self._detached = True
        self.exposure.detach()
        self._hook.remove()
        if self._clipping is not None:
            self._clipping.detach()

    def end(self, keep: Path | None = None, until: int | None = None) -> None:
        """Training is over; `finish` calls this by itself.

        Args:
            keep (`Path`, *optional*): where the record is put, to be finished with `build_bank` should the passes
                fail.
            until (`int`, *optional*): the step of which the weights are, if not the last (a best model loaded back).
        """
        self.detach()
        self._spent = time.perf_counter() - self._began
        self._merge()
        if self.rows is None:
            self._keep_rows()
        self.record.end = self.snapshot(until or self.taken)
        with self.ranks.raise_on_all_ranks():
            if keep is not None and self.ranks.rank == 0:
                self.record.save(keep)

    def _keep_rows(self) -> None:
        """From the ids of a stream's rows to positions in a dataset of those that were seen."""
        seen = torch.cat(self.record.rows).unique()
        with self.ranks.raise_on_all_ranks():
            self._kept = KeptRows(self.original, str(self.config.row_id_column), seen.tolist())
        self.rows = self.original = self._kept.dataset
        self.record.rows = [torch.searchsorted(seen, rows) for rows in self.record.rows]
        self.record.total = len(self.rows)

    def finish(self, folder: str | Path) -> ResponseBank:
        """The passes over the training set; writes the bank into the folder and opens it.

        Args:
            folder (`str` or `Path`): the bank's own, `<where the model is saved>/fwdattr`; of a disk that all ranks
                see.
        """
        if self.record.end is None:
            self.end()
        assert self.record.end is not None
        return respond(
            self.record, self.record.end, self.model, self.parameters, self.rows, self.exposure.collate, self.config,
            Path(folder), original=self.original, tokenizer=self.tokenizer, ranks=self.ranks,
            pace=self._spent / self._visits if self._visits else None,
        )  # fmt: skip


def _refuse(accelerator: Any) -> None:
    """Ways of sharing a model or its rows in which what a rank sees says nothing of single weights or rows."""
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UnsupportedError("FSDP1 flattens weights, so they cannot be told apart; set fsdp_config={'version': 2}")
    if type(getattr(plugin, "cpu_offload", None)).__name__ == "CPUOffloadPolicy":
        raise UnsupportedError("FSDP's cpu_offload was never tried with responses; set it to False")
    layout = getattr(accelerator, "parallelism_config", None)
    if layout is not None and layout.non_data_parallel_size > 1:
        raise UnsupportedError(
            "tensor, context and sequence parallelism show a row to several ranks: set their sizes to 1"
        )
