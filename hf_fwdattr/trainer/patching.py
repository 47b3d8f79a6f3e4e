"""Patches: every change that this package makes in a trainer, an accelerator, a dataloader, an optimizer or a model.

| object | what is patched | why | until |
|---|---|---|---|
| dataloader | `dataset`, `collate_fn` | batches carry their row indices | training ends |
| model | hooks before and after `forward` | take row indices out, see the gradient of the loss | training ends |
| optimizer | hook before `step` | read learning rate and loss scale | training ends |
| optimizer | hook after `step` | compare the step with its state | training ends |
| tracked Linears | hooks before and after `forward` | capture rows' gradients | training ends |
| tracked weights | hooks on gradients | compare them with those of their rows | training ends |
| tracked weights | hooks after gradients arrive | compare them with what the optimizer gets | training ends |
| accelerator | `clip_grad_norm_`, `clip_grad_value_` | read the clipping factor | training ends |
| accelerator | `backward` | compare the loss with the model's | training ends |
| trainer | `create_model_card`, `push_to_hub` | publish the bank with the model | for good |
| trainer, by `add_to` | `train` | see the checkpoint that training resumes from | for good |
| trainer, by `apply_row_weights` | `compute_loss`, dataset, collator, one argument | weight losses | for good |
| trainer of the self-check | `_get_train_sampler` | repeat the order of rows | for good |

Trainers patched by `apply_row_weights` and the self-check are never those of a recorded run.
"""

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Trainer

from ..models.interrupts import uninterrupted


__all__ = ["Patches", "TrainCall", "find_train_call"]

_MISSING = object()


class Patches:
    """Replaced attributes and registered hooks of other objects, undone together, the latest first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(self, target: Any, **values: Any) -> None:
        """Set attributes of an object, also those that its own `__setattr__` forbids, as DataLoader's `dataset`."""
        for name, value in values.items():
            self._undo.append(partial(_restore, target, name, vars(target).get(name, _MISSING)))
            object.__setattr__(target, name, value)

    def hook(self, *handles: Any) -> None:
        """Take over handles of registered hooks, which `undo` removes."""
        self._undo.extend(handle.remove for handle in handles)

    def undo(self) -> None:
        """Leave every object as it was found; a second call does nothing."""
        with uninterrupted():
            while self._undo:
                self._undo.pop()()


def _restore(target: Any, name: str, old: Any) -> None:
    if old is _MISSING:  # an attribute of the class, which shows again
        object.__delattr__(target, name)
    else:
        object.__setattr__(target, name, old)


class TrainCall:
    """Stand-in for a trainer's `train` that keeps the checkpoint it resumes from, which no callback is told.

    Attributes:
        trainer (`Trainer`): the patched trainer.
        checkpoint (`str`, *optional*): folder given to `train`; None for a fresh start or the last checkpoint.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.checkpoint, self._train = trainer, None, trainer.train
        Patches().replace(trainer, train=self)

    def __call__(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train."""
        given = isinstance(resume_from_checkpoint, str | os.PathLike)
        self.checkpoint = resume_from_checkpoint if given else None
        return self._train(resume_from_checkpoint, *args, **kwargs)


def find_train_call() -> tuple[Trainer | None, Any]:
    """Return the trainer that calls a callback and the checkpoint it resumes from, from the callers' frames.

    The fallback for callbacks that were given to `Trainer(callbacks=[...])`, which are told neither.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    return None, None
