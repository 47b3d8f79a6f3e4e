"""Publication of the bank by the Trainer's own pushes: the card keeps its section, the Hub keeps one bank."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..bank.bank import ResponseBank
from ..bank.card import with_section
from ..bank.files import write_atomically
from ..bank.push import remove_stale_on_hub
from .patching import Patches


__all__ = ["add_section", "push_at_end", "push_with_bank", "wait_for_pushes"]

logger = logging.getLogger(__name__)


class _BankPublisher:
    """Stand-in for a method of a trainer that publishes; works on rank 0, once there is a bank."""

    def __init__(self, trainer: Trainer, method: str, folder: str):
        self.original, self.trainer, self.folder = getattr(trainer, method), trainer, folder

    @property
    def has_bank(self) -> bool:
        output = Path(self.trainer.args.output_dir)
        return self.trainer.is_world_process_zero() and (output / self.folder / "bank.json").is_file()

    @property
    def repository(self) -> str:
        args = self.trainer.args
        return str(self.trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).name)


class _CardWithSection(_BankPublisher):
    """`create_model_card`, which writes README.md anew each time, followed by the bank's section."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.original(*args, **kwargs)
        if not self.has_bank:
            return
        try:
            add_section(Path(self.trainer.args.output_dir), self.folder, self.repository)
        except Exception as error:  # the model is pushed, whatever is wrong with the card
            logger.error("the model's card has no section about its response bank: %s", error)


class _PushOfOneBank(_BankPublisher):
    """`push_to_hub`, which only adds files, followed by the removal of shards that a new bank replaces."""

    def __call__(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        commit = self.original(commit_message, blocking, token, revision, **kwargs)
        if not self.trainer.is_world_process_zero():
            return commit
        if blocking:
            self._remove_stale(token, revision)
        else:
            commit.add_done_callback(
                lambda job: self._remove_stale(token, revision) if job.exception() is None else None
            )
        return commit

    def _remove_stale(self, token: str | None, revision: str | None) -> None:
        args = self.trainer.args
        if not self.has_bank:
            return
        try:
            remove_stale_on_hub(
                self.repository, subfolder=self.folder, token=token or args.hub_token,
                revision=revision or args.hub_revision,
            )  # fmt: skip
        except Exception as error:  # stale shards are not read; the next push removes them
            logger.warning("shards of an older response bank are still on the Hub: %s", error)


def push_with_bank(trainer: Trainer | None, folder: str) -> None:
    """Patch the trainer so that its card keeps the bank's section and its pushes leave one bank.

    A trainer is patched once, however often it trains.
    """
    if trainer is None:
        return
    if isinstance(trainer.create_model_card, _CardWithSection):
        trainer.create_model_card.folder = trainer.push_to_hub.folder = folder
    else:
        card = _CardWithSection(trainer, "create_model_card", folder)
        Patches().replace(trainer, create_model_card=card, push_to_hub=_PushOfOneBank(trainer, "push_to_hub", folder))


def wait_for_pushes(trainer: Trainer | None) -> None:
    """Wait for a push that runs beside the training: it must not upload a folder half-way between two banks."""
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

    Its last push of that kind is made before there is a bank. With `hub_strategy="end"`, `save_model` or `push_to_hub`
    pushes later and takes the bank along.
    """
    if trainer is None or not args.push_to_hub or args.hub_strategy == HubStrategy.END:
        return
    try:
        trainer.push_to_hub(commit_message="Model and response bank", blocking=True)
    except Exception as error:  # the training must not be lost with a connection
        logger.error(
            "training and its response bank are complete, but the push failed: %s. Call trainer.push_to_hub()", error
        )
