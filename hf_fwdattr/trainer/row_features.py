"""Features of training rows from one plain forward pass each, where no gradient predictor is known for the model."""

import logging

import torch

from ..errors import UnsupportedError
from ..gradients.derivative_regression import FeatureTable
from ..gradients.forward_features import ForwardFeatures
from ..response.progress import progress_bar
from .build_context import BuildContext


__all__ = ["ContextFeatures"]

logger = logging.getLogger(__name__)


class ContextFeatures:
    """Computes features of training rows when it is called; see `response.sample_regression.RowFeatures`."""

    def __init__(self, context: BuildContext):
        self._context = context

    def __call__(self, rows: list[int]) -> FeatureTable | None:
        """Return features of ascending rows, float32; None if impossible."""
        try:
            return self._features(rows)
        except UnsupportedError as error:  # the responses, which took longer, are not lost with it
            logger.warning(
                "the bank expects nothing of a query before it is read: %s. It takes more passes to find its rows",
                str(error).rstrip("."),
            )
            return None

    def _features(self, rows: list[int]) -> FeatureTable:
        context = self._context
        compute = ForwardFeatures(context.model, context.parameters, context.objective)
        place = torch.full((len(context.rows),), -1)
        place[torch.tensor(rows)] = torch.arange(len(rows))
        result = torch.zeros(0, 0)
        with progress_bar(total=len(rows), desc="features", unit="row", disable=context.config.quiet) as bar:
            for indices, batch in context.rows.batches(rows):
                features = compute(batch)
                if not len(result):
                    result = torch.zeros(len(rows), features.shape[1])
                if features.shape[1] != result.shape[1]:
                    raise UnsupportedError("features of rows: their number differs between batches")
                result[place[indices]] = features
                bar.update(len(indices))
        if not bool(result.isfinite().all()):
            raise UnsupportedError("features of rows: not all of them are finite")
        return FeatureTable(result, compute.group_sizes, compute.leading)
