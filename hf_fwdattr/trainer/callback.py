"""The callback: record while the model trains, then respond, factorise and write."""

import inspect
import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..bank.bank import ResponseBank
from ..config import ResponseConfig
from ..errors import AttributionError, UnsupportedError
from .publish import finish_pushes, keep_card, push_at_end
from .recorder import ResponseRecorder
from .self_check import SelfCheck


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
        self._recorder: ResponseRecorder | None = None
        self._bank: ResponseBank | Exception | None = None

    @property
    def bank(self) -> ResponseBank | None:
        """The bank, after training; reading it raises whatever kept it from being made."""
        if isinstance(self._bank, Exception):
            raise self._bank
        return self._bank

    @property
    def recorder(self) -> ResponseRecorder:
        """What records the run, from its beginning on."""
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
        """Check everything that can be checked before a step is taken, and attach."""
        assert model is not None
        trainer, checkpoint = _training_call()
        _refuse(args, trainer)
        if self.config.self_check and args.world_size > 1:
            raise UnsupportedError("self_check trains again in one process; set self_check=0 under several")
        if self._recorder is not None:  # an earlier run, perhaps interrupted
            self._recorder.detach()
        self._recorder, self._bank, self._trainer = None, None, trainer
        folder = Path(checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}") / RECORD
        averaged = args.average_tokens_across_devices
        self._recorder = ResponseRecorder(
            self.config, accelerator=None if trainer is None else trainer.accelerator,
            model=model if trainer is None else trainer.model_wrapped, optimizer=optimizer,
            dataloader=train_dataloader, steps=state.max_steps, processing_class=processing_class,
            dataset=trainer.train_dataset if self.dataset is None and trainer is not None else self.dataset,
            resume=folder if _recorded(folder, state) else None, begun=state.global_step,
            _smoothing=args.label_smoothing_factor,
            _rule=(args.world_size if averaged else 1) if args.label_smoothing_factor else None,
        )  # fmt: skip
        self._check = SelfCheck(model, trainer) if self.config.self_check else None
        keep_card(trainer, self.config.folder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rows and the learning rate of the step that was just taken; half-way through a segment, copy what
        responds."""
        if self._recorder is not None:
            self._recorder.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the record into the checkpoint, so that a resumed run ends with the same bank."""
        if self._recorder is not None:
            self._recorder.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RECORD)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Respond, factorise and write; what was recorded is on disk until the bank is."""
        recorder = self._recorder
        if recorder is None:
            return
        # A name that begins with an underscore is not uploaded with the model.
        kept = Path(args.output_dir) / f"_{RECORD}"
        best = state.best_global_step if args.load_best_model_at_end else None
        try:
            recorder.end(kept, best)
            finish_pushes(self._trainer)
            self._bank = recorder.finish(Path(args.output_dir) / self.config.folder)
        except Exception as error:  # whatever it is, the trained model must not be lost with the bank
            self._bank = error
            if state.is_world_process_zero:
                logger.error(
                    "training is done, but its response bank could not be made: %s\nWhat was recorded is in %s: "
                    "finish with build_bank(model, dataset, config, record=%r)",
                    error, kept, str(kept), exc_info=not isinstance(error, AttributionError | OSError),
                )  # fmt: skip
        else:
            if state.is_world_process_zero:
                shutil.rmtree(kept)
            if self._check is not None:
                order = recorder.record.rows
                self._check(
                    self._bank, recorder.model, recorder.rows, recorder.exposure.collate, order, self.config
                )  # fmt: skip
            push_at_end(self._trainer, args)


def _recorded(folder: Path, state: TrainerState) -> bool:
    """Whether the run goes on from a checkpoint with a record; without one, the bank can only be of what follows."""
    if state.global_step and not folder.is_dir() and state.is_world_process_zero:
        logger.warning(
            "training resumes at step %d, but %s is missing: the checkpoint was made without ResponseCallback (or the "
            "run was killed while it was made: then resume from the one before). The bank will hold responses to the "
            "steps from here on only, and say so in its bank.json (run.first)",
            state.global_step, folder,
        )  # fmt: skip
    return state.global_step > 0 and folder.is_dir()


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
    if trainer is not None and getattr(trainer, "compute_loss_func", None) is not None:
        raise UnsupportedError("a custom compute_loss_func is not the model's own likelihood; train without it")
    if hasattr(trainer, "ref_model"):  # TRL's DPO, KTO, GRPO
        raise UnsupportedError(
            f"{type(trainer).__name__} compares outputs with those of a reference model: its loss is no likelihood of "
            "an output, and its rows are no outputs; responses are known for supervised fine-tuning (SFTTrainer)"
        )
    if getattr(args, "packing", False):  # TRL's
        raise UnsupportedError(
            "packing=True makes rows of pieces of rows, which cannot be told apart; set packing=False "
            "(padding_free=True with ResponseConfig(batch_size=1) computes no padding either)"
        )
    if args.n_gpu > 1:
        raise UnsupportedError(f"DataParallel over {args.n_gpu} GPUs is not supported: make only one visible")
    if trainer is not None and trainer.is_deepspeed_enabled:
        raise UnsupportedError(
            "DeepSpeed keeps weights and optimizer state in its own engine, where they cannot be read step by step; "
            "train with DDP"
        )
