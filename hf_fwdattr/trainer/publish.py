"""The bank on its way to the Hub with the Trainer's own push: the card keeps its section."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..bank.bank import ResponseBank
from ..bank.card import with_section
from ..bank.files import write_atomically
from ..bank.push import remove_stale_on_hub
from ..errors import BankError


logger = logging.getLogger(__name__)


class KeptCard:
    """A trainer's `create_model_card`, which writes README.md anew each time, followed by the bank's section."""

    def __init__(self, trainer: Trainer, folder: str):
        self._original, self._trainer, self.folder = trainer.create_model_card, trainer, folder

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._original(*args, **kwargs)
        if not self._trainer.is_world_process_zero():
            return
        output = Path(self._trainer.args.output_dir)
        if not (output / self.folder / "bank.json").is_file():
            return
        try:
            add_section(output, self.folder, _repository(self._trainer))
        except BankError as error:  # the model must go up, whatever is wrong with the card
            logger.error("the model's card says nothing about its response bank: %s", error)


class SweptPush:
    """A trainer's `push_to_hub`, which only adds files, followed by the end of the shards that a new bank replaced."""

    def __init__(self, trainer: Trainer, folder: str):
        self._original, self._trainer, self.folder = trainer.push_to_hub, trainer, folder

    def __call__(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        done = self._original(commit_message, blocking, token, revision, **kwargs)
        if not self._trainer.is_world_process_zero():
            return done
        if blocking:
            self._sweep(token, revision)
        else:
            done.add_done_callback(lambda job: self._sweep(token, revision) if job.exception() is None else None)
        return done

    def _sweep(self, token: str | None, revision: str | None) -> None:
        args = self._trainer.args
        if not (Path(args.output_dir) / self.folder / "bank.json").is_file():
            return
        try:
            remove_stale_on_hub(
                _repository(self._trainer), subfolder=self.folder, token=token or args.hub_token,
                revision=revision or args.hub_revision,
            )  # fmt: skip
        except BankError as error:  # what is left over is not read; the next push removes it
            logger.warning("shards of an older response bank are still on the Hub: %s", error)


def keep_card(trainer: Trainer | None, folder: str) -> None:
    """Make the trainer's card keep its section and its pushes leave one bank; once, however often it trains."""
    if trainer is None:
        return
    if isinstance(trainer.create_model_card, KeptCard):
        trainer.create_model_card.folder = trainer.push_to_hub.folder = folder
    else:
        trainer.create_model_card = KeptCard(trainer, folder)
        trainer.push_to_hub = SweptPush(trainer, folder)


def finish_pushes(trainer: Trainer | None) -> None:
    """Wait for a push that runs beside the training: it must not see the bank's folder half-way between two banks."""
    if trainer is not None:
        trainer._finish_current_push()


def add_section(model_folder: Path, folder: str, repo_id: str) -> None:
    """Write the section about the bank in `model_folder/folder` into the model's README.md.

    Raises:
        BankError: the bank is damaged, or the card's header is no YAML.
    """
    card = model_folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    manifest = ResponseBank(model_folder / folder, verify=False).manifest
    write_atomically(card, with_section(text, manifest, repo_id, subfolder=folder).encode())


def push_at_end(trainer: Trainer | None, args: TrainingArguments) -> None:
    """Push model and bank together where the Trainer pushes by itself while it trains; a failure is only logged.

    Its last push of that kind was before there was a bank. With `hub_strategy="end"`, it is `save_model` or
    `push_to_hub` that pushes, and takes the bank along.
    """
    if trainer is None or not args.push_to_hub or args.hub_strategy == HubStrategy.END:
        return
    try:
        trainer.push_to_hub(commit_message="Model and response bank", blocking=True)
    except Exception as error:  # the training must not be lost with a connection
        logger.error("training and its response bank are done, but were not pushed: %s; trainer.push_to_hub()", error)


def _repository(trainer: Trainer) -> str:
    return str(trainer.hub_model_id or trainer.args.hub_model_id or Path(trainer.args.output_dir).name)
