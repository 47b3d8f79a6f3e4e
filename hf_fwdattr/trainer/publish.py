"""The bank on its way to the Hub with the Trainer's own push: the card keeps its section."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..bank.bank import ResponseBank
from ..bank.card import with_section
from ..bank.files import write_atomically
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


def keep_card(trainer: Trainer | None, folder: str) -> None:
    """Make the trainer's card keep its section; once, however often it trains."""
    if trainer is None:
        return
    if isinstance(trainer.create_model_card, KeptCard):
        trainer.create_model_card.folder = folder
    else:
        trainer.create_model_card = KeptCard(trainer, folder)


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
