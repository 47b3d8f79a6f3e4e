"""The guard: before the first step errors are raised, afterwards they are kept and training goes on without us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["Guard"]

logger = logging.getLogger(__name__)


class Guard:
    """Keeper of errors of a recording whose training has begun.

    Attributes:
        training (`bool`): whether an optimizer step was taken; errors are kept from then on.
        error (`Exception`, *optional*): the first error that was kept. Nothing is recorded after it.
    """

    def __init__(self) -> None:
        self.training = False
        self.error: Exception | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run a piece of recording; what it raises is kept and logged once if training has begun."""
        try:
            yield
        except Exception as error:
            self.refuse(error)

    def refuse(self, error: Exception) -> None:
        """Raise the error, or keep it and log it once if training has begun."""
        if not self.training:
            raise error
        if self.error is None:
            self.error = error
            logger.error(
                "the recording of this training has ended, so there will be no response bank: %s\nTraining goes on as "
                "without it", error,
            )  # fmt: skip

    def raise_kept(self) -> None:
        """Raise the error that was kept, if any."""
        if self.error is not None:
            raise self.error
