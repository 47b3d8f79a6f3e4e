"""The fit of the gradient predictor on some training rows, and the gradients that it predicts of others."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UnsupportedError
from ..gradients.predictor import GradientPredictor
from ..models.fsdp import is_sharded
from ..models.likelihood import Batch
from ..response.progress import progress_bar
from ..response.storage import Storage, blocks
from .build_context import BuildContext


__all__ = ["PREDICTOR_MISSING", "PredictorFit", "missing_predictor", "predictor_bytes"]

PREDICTOR_MISSING = "Without one a query's first estimate knows nothing of the query, so it takes more passes"
_CHUNK = 256  # rows whose columns the ranks share together
logger = logging.getLogger(__name__)


def missing_predictor(context: BuildContext) -> str:
    """Return why a model or its memory supports no gradient predictor; empty if they do."""
    try:
        _unfitted(context)
    except UnsupportedError as error:
        return str(error).rstrip(".")
    return ""


def predictor_bytes(context: BuildContext) -> int:
    """Return the bytes that the fit takes; 0 if no predictor is supported."""
    try:
        return _unfitted(context).fitting_bytes
    except UnsupportedError:
        return 0


@dataclass
class PredictorFit:
    """Fits a gradient predictor when it is called; see `response.assembly.Predict`.

    Attributes:
        context (`BuildContext`): what the bank is built from.
        storage (`Storage`): where predicted gradients go.
        error_projections (`dict[str, Tensor]`): on rank 0, by canonical path of the layer; see `gradients.predictor`.
        missing (`str`): why there is none; empty where there is one.
    """

    context: BuildContext
    storage: Storage
    error_projections: dict[str, Tensor] = field(default_factory=dict)
    missing: str = ""

    def __call__(self, fit_rows: list[int], rows: list[int]) -> Tensor | None:
        """Fit on rows, and return the predicted gradients (n, own columns) of ascending `rows`; None if impossible."""
        ranks, size = self.context.ranks, self.context.parameters.size
        predicted = torch.zeros(0, size)
        with ranks.raise_on_all_ranks():
            if ranks.rank == 0:
                try:
                    predicted = self._fit(fit_rows, rows)
                except UnsupportedError as error:  # the responses, which took longer, are not lost with it
                    self.missing = str(error)
                    logger.warning(
                        "the bank has no gradient predictor: %s. %s", self.missing.rstrip("."), PREDICTOR_MISSING
                    )
        self.missing = ranks.objects(self.missing)[0]
        if self.missing:
            return None
        if ranks.size == 1:
            return predicted
        columns = ranks.columns(size)
        own = self.storage.zeros(len(rows), columns.stop - columns.start)
        for lines in blocks(len(rows), _CHUNK):
            positions, block = torch.arange(len(rows))[lines], predicted[lines]
            given = (positions, block) if ranks.rank == 0 else (positions[:0], predicted[:0])
            at, part = ranks.exchange(*given, _CHUNK)
            own[at] = part
        return own

    def _fit(self, fit_rows: list[int], rows: list[int]) -> Tensor:
        """Return the predicted gradients (n, P) of `rows`."""
        source, quiet = self.context.rows, self.context.config.quiet
        predictor = _unfitted(self.context)
        with progress_bar(total=len(fit_rows), desc="gradient predictor", unit="row", disable=quiet) as bar:
            self.error_projections = predictor.fit(_counted(source.batches(fit_rows), bar))
        place = torch.full((len(source),), -1)
        place[torch.tensor(rows)] = torch.arange(len(rows))
        predicted = self.storage.zeros(len(rows), self.context.parameters.size)
        with progress_bar(total=len(rows), desc="predicted gradients", unit="row", disable=quiet) as bar:
            for indices, batch in source.batches(rows):
                predicted[place[indices]] = predictor(batch).cpu()
                bar.update(len(indices))
        return predicted


def _unfitted(context: BuildContext) -> GradientPredictor:
    """Return the predictor before its fit.

    Raises:
        UnsupportedError: the model does not support one, or not in this memory.
    """
    if is_sharded(context.model):
        raise UnsupportedError("the gradient predictor reads whole weights, and FSDP shards them")
    predictor = GradientPredictor(context.model, context.parameters, context.objective)
    if predictor.fitting_bytes > context.config.memory_budget:
        raise UnsupportedError(
            f"memory_budget={context.config.memory_budget}: fitting the gradient predictor takes "
            f"{predictor.fitting_bytes / 2**30:.1f} GiB. Raise memory_budget"
        )
    return predictor


def _counted(batches: Iterator[tuple[Tensor, Batch]], bar: tqdm) -> Iterator[Batch]:
    """Yield the batches, counted on a progress bar."""
    for indices, batch in batches:
        yield batch
        bar.update(len(indices))
