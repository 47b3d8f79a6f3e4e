"""The callback that records a `Trainer` run, and computes and writes its response bank when training ends."""

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import AttributionError, UnsupportedError
from ..models.parameters import TrackedParameters
from .accelerators import refuse_accelerator
from .columns import rows_in_trained_order
from .patching import TrainCall, find_train_call
from .publish import push_at_end, push_with_bank, wait_for_pushes
from .record import CAPTURES, END_RECORD, RECORD
from .recorder import ResponseRecorder
from .self_check import SelfCheck


__all__ = ["RECORD", "ResponseCallback", "refuse_trainer"]

logger = logging.getLogger(__name__)


class ResponseCallback(TrainerCallback):
    """Make the response bank of a fine-tune that a `Trainer` runs; the training itself is unchanged, to the last bit.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=train, data_collator=collator)
    callback = ResponseCallback(ResponseConfig(source_column="publisher")).add_to(trainer)
    trainer.train()
    trainer.save_model()  # the bank is beside it, in output_dir/fwdattr
    callback.bank  # the same bank, open
    ```

    `Trainer(..., callbacks=[ResponseCallback(config)])` does the same. [`~ResponseCallback.add_to`] refuses earlier,
    before the model is even prepared. TRL's `SFTTrainer` works like `Trainer`.

    While the model trains, the callback records row indices, learning rate and clipping of every optimizer step, and
    copies the tracked parameters and the optimizer's diagonal once per segment. It captures rows' gradients in the
    backward passes that train, where it can (see `ResponseConfig.capture`). When training ends it reads some more rows
    forward and backward: of S segments, S times the curvature samples, and the sample rows.

    **On disk.** The bank lies in `output_dir/fwdattr` (see `ResponseConfig.folder`), so the Trainer's pushes upload it
    with the model, and the model card gets a section about it. Every checkpoint holds a `fwdattr-record`, so a resumed
    run ends with the bank of an uninterrupted one. Nothing else is left.

    **If the passes fail**, the training is not lost with them: `train()` ends as it would have, the error is logged,
    and `callback.bank` raises it. The record stays in `output_dir/_fwdattr-record`, and
    `build_bank(model, dataset, config, data_collator=..., record="<output_dir>/_fwdattr-record")` completes the bank.
    So it does after a process that was killed in the passes.

    **Refused** before the first step, as far as a few rows show it: optimizers other than AdamW and Adam (also fused,
    of torchao and bitsandbytes), Adafactor as Trainer sets it, and SGD; `compute_loss_func`; DPO, KTO, GRPO;
    `packing=True`; random collators; a stream without `row_id_column`; DataParallel, DeepSpeed, FSDP1, tensor
    parallelism. By the values of the first step: a loss with other terms or weights, gradients that are changed on
    their way to the optimizer. The same, found later, is a warning. Once training has begun, nothing that the callback
    does can end it: `callback.bank` raises what went wrong.

    Args:
        config (`ResponseConfig`, *optional*): settings.
        dataset (*optional*): the training set with its row-id and source columns; needed only with a trainer that
            does not keep it as `train_dataset`.

    Raises:
        UnsupportedError: from `add_to` or `train()`, for what is refused.
    """

    def __init__(self, config: ResponseConfig | None = None, dataset: Any = None):
        self.config = config or ResponseConfig()
        self.dataset = dataset
        self._call: TrainCall | None = None
        self._trainer: Trainer | None = None
        self._recorder: ResponseRecorder | None = None
        self._check: SelfCheck | None = None
        self._bank: ResponseBank | Exception | None = None

    def add_to(self, trainer: Trainer) -> "ResponseCallback":
        """Add the callback to a trainer and return it.

        Args:
            trainer (`Trainer`): a Trainer or SFTTrainer that is not training yet.

        Raises:
            UnsupportedError: the trainer, its accelerator or the choice of `parameters` is not supported.
        """
        refuse_trainer(trainer.args, trainer, self.config)
        refuse_accelerator(trainer.accelerator)
        _refuse_second(trainer, self)
        assert trainer.model is not None
        TrackedParameters.of(trainer.model, self.config.parameters, sharded=True)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._call = TrainCall(trainer)
        return self

    @property
    def bank(self) -> ResponseBank | None:
        """The bank, after training; None before.

        Raises:
            Exception: the error that the passes ended with.
        """
        if self._recorder is not None:
            self._recorder.guard.raise_kept()
        if isinstance(self._bank, Exception):
            raise self._bank
        return self._bank

    @property
    def recorder(self) -> ResponseRecorder:
        """The recorder of the run, once training has begun."""
        assert self._recorder is not None, "training has not begun"
        return self._recorder

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
        """Check everything that can be checked before the first step, and begin to record."""
        assert model is not None
        earlier, self._recorder, self._bank = self._recorder, None, None
        if earlier is not None:  # perhaps interrupted
            earlier.detach()
        if self._call is not None and self._call.trainer.state is state:
            trainer, checkpoint = self._call.trainer, self._call.checkpoint
        else:
            trainer, checkpoint = find_train_call()
        self._trainer = trainer
        refuse_trainer(args, trainer, self.config)
        _refuse_second(trainer, self)
        folder = Path(checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}") / RECORD
        recorder = ResponseRecorder(
            self.config, accelerator=None if trainer is None else trainer.accelerator,
            model=model if trainer is None else trainer.model_wrapped, optimizer=optimizer,
            dataloader=train_dataloader, steps=state.max_steps, processing_class=processing_class,
            dataset=_rows_with_columns(self.dataset, trainer, self.config),
            resume=folder if _has_record(folder, state) else None,
        )  # fmt: skip
        smoothing, averaged = args.label_smoothing_factor, args.average_tokens_across_devices
        recorder.describe_run(
            steps_taken=state.global_step, label_smoothing=smoothing,
            loss_gradient=float(args.world_size if averaged else 1) if smoothing else None,
            captures=Path(args.output_dir) / END_RECORD / CAPTURES,
            rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )  # fmt: skip
        if earlier is not None and recorder.record.taken == 0:
            _note_earlier_steps(recorder, earlier)
        self._recorder = recorder
        self._check = SelfCheck(model, trainer) if self.config.self_check else None
        push_with_bank(trainer, self.config.folder)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step that was just taken."""
        if self._recorder is not None:
            self._recorder.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record into the checkpoint, so that a resumed run ends with the same bank."""
        if self._recorder is not None:
            self._recorder.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RECORD)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Compute and write the bank; the record stays on disk until the bank is there."""
        recorder = self._recorder
        if recorder is None:
            return
        record_folder = Path(args.output_dir) / END_RECORD
        try:
            recorder.end(record_folder, state.best_global_step if args.load_best_model_at_end else None)
            wait_for_pushes(self._trainer)
            self._bank = recorder.finish(Path(args.output_dir) / self.config.folder)
        except Exception as error:  # whatever it is, the trained model must not be lost with the bank
            self._bank = error
            if state.is_world_process_zero and recorder.guard.error is None:
                logger.error(
                    "training is complete, but its response bank could not be made: %s\nThe record of the run is in "
                    "%s. Complete the bank with %s", error, record_folder, self._recovery(record_folder),
                    exc_info=not isinstance(error, AttributionError | OSError),
                )  # fmt: skip
            return
        try:
            if state.is_world_process_zero:
                shutil.rmtree(record_folder)
            if self._check is not None:
                self._check.run_safely(
                    self._bank, recorder.model, recorder.rows, recorder.batches.collate, recorder.record.rows,
                    self.config,
                )  # fmt: skip
            push_at_end(self._trainer, args)
        except Exception as error:  # the bank is complete
            logger.error("training and its response bank are complete, but what follows them failed: %s", error)

    def _recovery(self, record_folder: Path) -> str:
        """Return the call that completes the bank from the record, with what the trainer was given."""
        if self._trainer is None:
            return f"build_bank(model, dataset, config, data_collator=..., record={str(record_folder)!r})"
        arguments = ["trainer.model", "trainer.train_dataset", "config", "data_collator=trainer.data_collator"]
        if getattr(self._trainer, "processing_class", None) is not None:
            arguments.append("processing_class=trainer.processing_class")
        return f"build_bank({', '.join(arguments)}, record={str(record_folder)!r})"


def _rows_with_columns(given: Any, trainer: Trainer | None, config: ResponseConfig) -> Any:
    """Return the training set with its row-id and source columns: the trainer's, or the one that the user gave.

    Raises:
        MismatchError: the given one has other rows than the trainer, or has them in another order.
    """
    if trainer is None or given is None:
        return given if trainer is None else trainer.train_dataset
    wanted = [name for name in (config.row_id_column, config.source_column, config.include_text) if name]
    seed = trainer.args.seed if getattr(trainer.args, "shuffle_dataset", False) else None  # TRL's
    return rows_in_trained_order(given, trainer.train_dataset, [str(name) for name in wanted], seed)


def _has_record(folder: Path, state: TrainerState) -> bool:
    """Return whether the run resumes from a checkpoint with a record; warn of one without."""
    if state.global_step and not folder.is_dir() and state.is_world_process_zero:
        logger.warning(
            "training resumes at step %d, but %s is missing: the checkpoint was made without ResponseCallback (or the "
            "run was killed while it was made: then resume from the one before). The bank will hold responses to the "
            "steps from here on only, and say so in its bank.json (run.first)",
            state.global_step, folder,
        )  # fmt: skip
    return state.global_step > 0 and folder.is_dir()


def _note_earlier_steps(recorder: ResponseRecorder, earlier: ResponseRecorder) -> None:
    """Note and warn of steps of an earlier record that this run does not continue, though its weights may."""
    if earlier.model is recorder.model and any(earlier.record.rates):
        recorder.record.notes.append(f"{earlier.taken} earlier steps of this model are not in the record")
        logger.warning(
            "training begins again at step 0 with a model that %d earlier steps have moved (train() a second time, or "
            "auto_find_batch_size). The bank will hold responses to the steps from here on only. To keep all, resume "
            "from a checkpoint, or load the model anew", earlier.taken,
        )  # fmt: skip


def _refuse_second(trainer: Trainer | None, callback: ResponseCallback) -> None:
    """Refuse two callbacks on one trainer: each would take the row indices of the other.

    Raises:
        UnsupportedError: the trainer has another one, or this one twice.
    """
    callbacks = [] if trainer is None else trainer.callback_handler.callbacks
    if sum(isinstance(one, ResponseCallback) for one in callbacks) > callbacks.count(callback) or (
        callbacks.count(callback) > 1
    ):
        raise UnsupportedError(
            "callbacks: more than one ResponseCallback. Each takes the row indices out of the batches, so only one "
            "sees them. Keep one; a second bank comes from build_bank(model, dataset, config, record=...)"
        )


def refuse_trainer(args: TrainingArguments, trainer: Trainer | None, config: ResponseConfig) -> None:
    """Refuse trainers and arguments under which the training loss is not the attributed likelihood row by row.

    Raises:
        UnsupportedError: a loss without rows, packed rows, DataParallel, DeepSpeed, a self-check under several ranks.
    """
    if trainer is not None and getattr(trainer, "compute_loss_func", None) is not None:
        raise UnsupportedError(
            "compute_loss_func: its loss is another than the model's own, the likelihood that a query is scored by. "
            "Train without it"
        )
    if hasattr(trainer, "ref_model"):  # TRL's DPO, KTO, GRPO
        raise UnsupportedError(
            f"{type(trainer).__name__} compares outputs with those of a reference model: its loss is no likelihood of "
            "an output, and its rows are no outputs. Use supervised fine-tuning (SFTTrainer)"
        )
    if getattr(args, "packing", False):  # TRL's
        raise UnsupportedError(
            "packing=True: it makes rows of pieces of rows, which cannot be told apart. Set packing=False "
            "(padding_free=True with ResponseConfig(batch_size=1) computes no padding either)"
        )
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"DataParallel over {args.n_gpu} GPUs: it copies the model at every step, and no copy knows its rows. "
            "Make one GPU visible (CUDA_VISIBLE_DEVICES), or start one process per GPU with torchrun"
        )
    if trainer is not None and trainer.is_deepspeed_enabled:
        raise UnsupportedError(
            "DeepSpeed keeps weights and optimizer state in its own engine, where they cannot be read step by step. "
            "Train with DDP or FSDP2"
        )
    if config.self_check and args.world_size > 1:
        raise UnsupportedError(
            f"self_check={config.self_check} trains again in one process, and this run has {args.world_size}. Set "
            "self_check=0"
        )
