"""Expected derivatives of a query along a bank's directions, beyond the predicted ones, from one forward pass."""

from functools import cached_property

import torch
from torch import Tensor

from ..gradients.derivative_regression import DerivativeRegression
from ..gradients.forward_features import ForwardFeatures
from .derivatives import QueryDerivatives
from .inputs import Query


__all__ = ["ExpectedDerivatives"]


class ExpectedDerivatives:
    """Reads a bank's regression of derivatives.

    Args:
        derivatives (`QueryDerivatives`): the bank, its model, and queries as batches.
    """

    def __init__(self, derivatives: QueryDerivatives):
        self._derivatives, self._bank = derivatives, derivatives.bank

    def __call__(self, query: Query, predicted: Tensor | None) -> Tensor:
        """Return what to expect of one query's derivatives: (k,), float64; zero where the bank has no regression.

        Args:
            predicted (`Tensor`, *optional*): (1, groups k) predicted derivatives by `predicted_derivatives`. Without
                them one plain forward pass is made.
        """
        if not self._bank.manifest.regression_features:
            return torch.zeros(self._bank.manifest.directions, dtype=torch.float64)
        return self._regression(self._forward(query) if predicted is None else predicted)[0]

    def _forward(self, query: Query) -> Tensor:
        batch, model = self._derivatives.batch([query]), self._derivatives.model
        with self._bank.query_weights(model, self._derivatives.parameters):
            return self._features(batch)

    @cached_property
    def _features(self) -> ForwardFeatures:
        derivatives = self._derivatives
        return ForwardFeatures(derivatives.model, derivatives.parameters, derivatives.objective)

    @cached_property
    def _regression(self) -> DerivativeRegression:
        return DerivativeRegression.from_tensors(self._bank.derivative_regression())
