"""The context of a build: model, training rows, settings, and the ranks that share the passes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..bank.schema import BITS, code_blocks
from ..config import ResponseConfig
from ..models.likelihood import Objective, resolve_objective
from ..models.parameters import TrackedParameters
from ..models.positions import context_length
from ..response.dataset import TrainingRows
from ..response.distributed import SINGLE_PROCESS, Ranks
from ..response.storage import rows_in_flight
from .columns import Sources, sources_of


__all__ = ["BuildContext"]

_FEW = 64 << 20  # bytes of row codes that a bank takes without a thought for their size


@dataclass(frozen=True)
class BuildContext:
    """Everything that a bank is built from, but the record of the run.

    Attributes:
        model (`nn.Module`): the fine-tuned model.
        parameters (`TrackedParameters`): the tracked parameters.
        config (`ResponseConfig`): settings.
        dataset, collate: the rows as they were trained on.
        original: the dataset before columns were removed, with row ids, sources and text.
        tokenizer (*optional*): identified in the bank by its hash; decodes the rows' text.
        ranks (`Ranks`): processes that share the passes, each with the same context.
        seconds_per_row (`float`, *optional*): time that training took for a row, for the estimate of time.
    """

    model: nn.Module
    parameters: TrackedParameters
    config: ResponseConfig
    dataset: Any
    collate: Callable[[list[Any]], Any]
    original: Any
    tokenizer: Any = None
    ranks: Ranks = SINGLE_PROCESS
    seconds_per_row: float | None = None

    @cached_property
    def objective(self) -> Objective:
        """Likelihood of the model."""
        return resolve_objective(self.model, self.config.objective)

    @cached_property
    def rows(self) -> TrainingRows:
        """Training rows in batches whose per-row gradients fit the memory budget.

        Raises:
            QueryError, UnsupportedError: rows that cannot be read; see [`TrainingRows`].
        """
        tensors = self.parameters.tensors(self.model)
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        largest = rows_in_flight(self.config.memory_budget, self.parameters.size, dtype)
        causal = self.objective.name in ("causal-lm", "causal-lm-unshifted")
        size_field = "vocab_size" if causal else "num_labels" if self.objective.name != "custom" else ""
        config = getattr(self.model, "config", None)
        length = context_length(self.model)
        return TrainingRows(
            self.dataset,
            self.collate,
            min(self.config.batch_size, largest),
            tensors[0].device,
            context_length=length,
            classes=getattr(config, size_field, None),
        )

    @cached_property
    def sources(self) -> Sources:
        """Sources of the rows."""
        return sources_of(self.original, self.config.source_column, len(self.rows))

    @property
    def keeps_predictor(self) -> bool:
        """True if the bank gets a gradient predictor: the settings want one and do not keep rows private."""
        return self.config.gradient_predictor and not self.config.private_rows

    @cached_property
    def code_bits(self) -> int:
        """Bits of a number in row codes: as many as the settings want, or fit; 0 where there are to be none."""
        config = self.config
        if config.private_rows or config.directions == "exact" or config.responses_budget == 0:
            return 0
        if config.row_code_bits != "auto":
            return config.row_code_bits
        count, block = code_blocks(self.parameters.size)
        for bits in sorted(BITS, reverse=True):
            size = len(self.rows) * count * (block * bits // 8 + 4)
            if size <= (_FEW if bits == max(BITS) else config.responses_budget):
                return bits
        return 0
