"""Expected derivatives of a query along a bank's directions, beyond the predicted ones, from one forward pass."""

from functools import cached_property

import torch
from torch import Tensor

from ..gradients.derivative_regression import DerivativeRegression
from ..gradients.forward_features import ForwardFeatures
from ..gradients.predicted_derivatives import column_groups, grouped_derivatives
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

    def __call__(self, query: Query, gradient: Tensor | None) -> Tensor:
        """Return what to expect of one query's derivatives: (k,), float64; zero where the bank has no regression.

        Args:
            gradient (`Tensor`, *optional*): (1, P) predicted gradient, on the CPU. Without it one plain forward pass
                is made.
        """
        if not self._bank.manifest.regression_features:
            return torch.zeros(self._bank.manifest.directions, dtype=torch.float64)
        features = self._forward(query) if gradient is None else self._predicted(gradient)
        return self._regression(features)[0]

    def _predicted(self, gradient: Tensor) -> Tensor:
        """Return the predicted derivatives by groups of weights: (1, F)."""
        directions = self._derivatives.directions(slice(0, self._bank.manifest.directions)).cpu()
        return grouped_derivatives(gradient, directions, column_groups(self._derivatives.parameters.sizes))

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
