"""The callback: record while the model trains, then respond, factorise and write."""

import inspect
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import AttributionError, UnsupportedError
from ..objective import objective_of
from ..parameters import Parameters
from .build import check, respond
from .exposure import Exposure, loader_of
from .optimizer import Preconditioner
from .publish import finish_pushes, keep_card, push_at_end
from .recorder import Record, Snapshot
from .selfcheck import SelfCheck


RECORD = "fwdattr-record"
logger = logging.getLogger(__name__)


class ResponseCallback(TrainerCallback):
    """Makes the response bank of a fine-tune, in `output_dir/fwdattr`, and leaves the training itself untouched.

    While the model trains it notes which rows each step saw and copies the responding parameters and the optimizer's
    diagonal once per segment. When training ends it makes about 2 S + 1 passes over the training set. Should they
    fail, the training is not lost with them: `train()` ends as it would have, the error is logged, `bank` raises it,
    and `build_bank(record="<output_dir>/_fwdattr-record")` can finish what was begun.

    Args:
        config (`ResponseConfig`, *optional*): settings.
        dataset (*optional*): the training set with its row-id and source columns. Found in the trainer by itself;
            needed only with a trainer that does not keep it as `train_dataset`.

    Raises:
        UnsupportedError: before the first step, for whatever the mathematics does not cover.
    """

    def __init__(self, config: ResponseConfig | None = None, dataset: Any = None):
        self.config = config or ResponseConfig()
        self.dataset = dataset
        self._exposure: Exposure | None = None
        self._bank: ResponseBank | Exception | None = None

    @property
    def bank(self) -> ResponseBank | None:
        """The bank, after training; reading it raises whatever kept it from being made."""
        if isinstance(self._bank, Exception):
            raise self._bank
        return self._bank

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked before a step is taken, and attach."""
        assert model is not None
        trainer, checkpoint = _training_call()
        _refuse(args, trainer)
        if self._exposure is not None:  # an earlier run was interrupted
            self._exposure.detach()
        self._exposure, self._bank = None, None
        self._original = trainer.train_dataset if self.dataset is None and trainer is not None else self.dataset
        self._tokenizer = processing_class
        self._parameters = Parameters.of(model, self.config.parameters)
        self._preconditioner = Preconditioner.of(optimizer, model, self._parameters)
        self._shifted = objective_of(model, self.config.objective).name == "causal-lm"
        loader = loader_of(train_dataloader)
        if self._original is None:
            self._original = loader.dataset
        check(model, loader.dataset, loader.collate_fn, self.config, self._original)
        folder = Path(checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}") / RECORD
        self._record = self._begin(state, folder, len(loader.dataset))  # type: ignore[arg-type]
        self._exposure = Exposure(model, loader)
        self._trainer = trainer
        self._check = SelfCheck(model, trainer) if self.config.self_check else None
        keep_card(trainer, self.config.folder)

    def _begin(self, state: TrainerState, folder: Path, total: int) -> Record:
        """A fresh record, or the one in `folder`, of the checkpoint from which the run is resumed."""
        if state.global_step == 0:
            seen = self._preconditioner
            return Record(
                state.max_steps, self.config.segments, seen.momentum, seen.weight_decay, total=total,
                optimizer=seen.kind,
            )  # fmt: skip
        if not folder.is_dir():
            raise UnsupportedError(
                f"training resumes at step {state.global_step}, but {folder} is missing: the checkpoint was made "
                "without ResponseCallback, so nobody knows which rows the earlier steps saw. Start over with the "
                "callback, or resume without it"
            )
        record = Record.load(folder)
        if record.steps != state.max_steps:
            raise UnsupportedError(f"the run was planned for {record.steps} steps and now for {state.max_steps}")
        if record.total != total:
            raise UnsupportedError(f"the run began with {record.total} rows and is resumed with {total}")
        return record

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rows and the learning rate of the step that was just taken."""
        if self._exposure is None:
            return
        optimizer = kwargs["optimizer"]
        rows, weights = self._exposure.step(self._shifted)
        rate = self._preconditioner.learning_rate(optimizer)
        self._record.add(0.0 if getattr(optimizer, "step_was_skipped", False) else rate, rows, weights)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy what responds, half-way through a segment."""
        if self._exposure is not None and self._record.due(state.global_step):
            self._record.snapshots.append(self._snapshot(state.global_step, **kwargs))

    def _snapshot(self, step: int, model: nn.Module, optimizer: Any, **_: Any) -> Snapshot:
        theta = self._parameters.read(model).cpu()
        return Snapshot(step, theta, self._preconditioner.diagonal(optimizer, model, self._parameters))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the record into the checkpoint, so that a resumed run ends with the same bank."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._exposure is not None and state.is_world_process_zero and folder.is_dir():
            replace(self._record, end=self._snapshot(state.global_step, **kwargs)).save(folder / RECORD)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Respond, factorise and write; what was recorded is on disk until the bank is."""
        if self._exposure is None:
            return
        exposure = self._exposure
        exposure.detach()
        self._exposure = None
        # A name that begins with an underscore is not uploaded with the model.
        kept = Path(args.output_dir) / f"_{RECORD}"
        try:
            best = state.best_global_step if args.load_best_model_at_end else None
            self._record.end = self._snapshot(best or state.global_step, **kwargs)
            self._record.save(kept)
            finish_pushes(self._trainer)
            self._bank = self._respond(kwargs["model"], exposure, Path(args.output_dir) / self.config.folder)
        except Exception as error:  # whatever it is, the trained model must not be lost with the bank
            self._bank = error
            logger.error(
                "training is done, but its response bank could not be made: %s\nWhat was recorded is in %s: finish "
                "with build_bank(model, dataset, config, record=%r)",
                error, kept, str(kept), exc_info=not isinstance(error, AttributionError | OSError),
            )  # fmt: skip
        else:
            shutil.rmtree(kept)
            if self._check is not None:
                order = self._record.rows
                self._check(self._bank, kwargs["model"], exposure.dataset, exposure.collate, order, self.config)
            push_at_end(self._trainer, args)

    def _respond(self, model: nn.Module, exposure: Exposure, folder: Path) -> ResponseBank:
        assert self._record.end is not None
        return respond(
            self._record, self._record.end, model, self._parameters, exposure.dataset, exposure.collate, self.config,
            folder, original=self._original, tokenizer=self._tokenizer,
        )  # fmt: skip


def _training_call() -> tuple[Trainer | None, str | None]:
    """The trainer whose event this is and the checkpoint that it resumes from, which no hook is handed.

    They are looked up among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    return None, None


def _refuse(args: TrainingArguments, trainer: Trainer | None) -> None:
    """What would make the recorded losses differ from the attributed likelihood, or is not there yet."""
    if args.label_smoothing_factor:
        raise UnsupportedError(
            "label smoothing changes the loss away from the likelihood; set label_smoothing_factor=0"
        )
    if trainer is not None and getattr(trainer, "compute_loss_func", None) is not None:
        raise UnsupportedError("a custom compute_loss_func is not the model's own likelihood; train without it")
    if args.n_gpu > 1:
        raise UnsupportedError(f"DataParallel over {args.n_gpu} GPUs is not supported: make only one visible")
    if args.world_size > 1:
        raise UnsupportedError(f"this run has {args.world_size} processes; several processes are not supported yet")
