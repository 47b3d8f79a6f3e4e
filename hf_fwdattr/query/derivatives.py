"""Directional derivatives of tokenized queries, at the weights where a bank's queries are read."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..bank.bank import ResponseBank
from ..jvp.backend import Backend, PreparedBatch
from ..models.parameters import TrackedParameters
from .inputs import Query, check_queries, pad_queries


__all__ = ["QueryDerivatives"]


class QueryDerivatives:
    """Differentiates the log-likelihood of queries along a bank's directions, or any others.

    Args:
        bank (`ResponseBank`): the bank.
        model (`nn.Module`): the model that the bank belongs to, in evaluation mode.
        parameters (`TrackedParameters`): its tracked parameters.
        backend (`Backend`): the way in which derivatives are computed.
    """

    def __init__(self, bank: ResponseBank, model: nn.Module, parameters: TrackedParameters, backend: Backend):
        self.bank, self.model, self.parameters, self.backend = bank, model, parameters, backend
        self._first, self._held = 0, torch.zeros(0)  # directions held in memory, and the index of the first of them

    @property
    def device(self) -> torch.device:
        """The tracked parameters' device."""
        return self.parameters.tensors(self.model)[0].device

    def batch(self, queries: Sequence[Query]) -> dict[str, Tensor]:
        """Return queries as a batch on the model's device, padded on the right.

        Raises:
            QueryError: no supervised token, labels that do not fit, or too long for the model.
        """
        check_queries(queries, self.model.config)
        return pad_queries(queries, self.device)

    def prepare(self, queries: Sequence[Query], two_stage: bool = False) -> PreparedBatch:
        """Pass queries through the model once, to be differentiated along directions as often as wanted.

        Args:
            two_stage (`bool`): rows are being chosen in two stages; see `Backend`.
        """
        batch = self.batch(queries)
        with self._query_weights():
            return _AtQueryWeights(self._query_weights, self.backend.prepare(batch, two_stage))

    def _query_weights(self) -> AbstractContextManager[None]:
        return self.bank.query_weights(self.model, self.parameters)

    def along(self, queries: Sequence[Query], lines: slice) -> Tensor:
        """Return derivatives along some of the bank's directions: (queries, positions, lines)."""
        return self.prepare(queries).jvp(self.directions(lines))

    def directions(self, lines: slice) -> Tensor:
        """Return some of the bank's directions (lines, P) on the model's device; they are read once and kept.

        Args:
            lines (`slice`): indices without a step; the rows' directions come before the sources'.
        """
        manifest = self.bank.manifest
        start, end, _ = lines.indices(manifest.directions + manifest.source_directions)
        held = range(self._first, self._first + len(self._held))
        if start < held.start or end > held.stop:
            self._first, last = (min(start, held.start), max(end, held.stop)) if held else (start, end)
            self._held = self.bank.directions(lines=slice(self._first, last)).to(self.device)
        return self._held[start - self._first : end - self._first]


class _AtQueryWeights:
    """A prepared batch whose derivatives are taken at the weights where the bank's queries are read."""

    def __init__(self, query_weights: Callable[[], AbstractContextManager[None]], prepared: PreparedBatch):
        self._query_weights, self._prepared = query_weights, prepared

    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate along (k, P); (queries, positions, k)."""
        with self._query_weights():
            return self._prepared.jvp(directions, chunk)
