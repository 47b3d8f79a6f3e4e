"""The guard: before the first step errors are raised, afterwards they are kept and training goes on without us."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ..response.distributed import SINGLE_PROCESS, Ranks


__all__ = ["Guard"]

logger = logging.getLogger(__name__)


class Guard:
    """Keeper of errors of a recording whose training has begun.

    Args:
        ranks (`Ranks`, *optional*): processes that train together.

    Attributes:
        training (`bool`): whether an optimizer step was taken; errors are kept from then on.
        error (`Exception`, *optional*): the first error that was kept. Nothing is recorded after it.
    """

    def __init__(self, ranks: Ranks = SINGLE_PROCESS) -> None:
        self._ranks, self.training = ranks, False
        self.error: Exception | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run a piece of recording; what it raises is kept and logged once if training has begun."""
        try:
            yield
        except Exception as error:
            self.refuse(error)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Raise an error of one rank on all of them, collectively, until training has begun; then as a call."""
        with self(), nullcontext() if self.training else self._ranks.raise_on_all_ranks():
            yield

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
