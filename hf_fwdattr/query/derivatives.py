"""Directional derivatives of tokenized queries, at the weights where a bank's queries are read."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..bank.bank import ResponseBank
from ..gradients.predictor import RecordedPass
from ..jvp.backend import Backend, PreparedBatch
from ..models.forward_state import StateMonitor
from ..models.likelihood import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from ..models.parameters import TrackedParameters
from .classifier_inputs import classifier_batch
from .inputs import Query, check_queries, pad_queries


__all__ = ["QueryDerivatives"]


class QueryDerivatives:
    """Differentiates the log-likelihood of queries along a bank's directions, or any others.

    Args:
        bank (`ResponseBank`): the bank.
        model (`nn.Module`): the model that the bank belongs to, in evaluation mode.
        parameters (`TrackedParameters`): its tracked parameters.
        backend (`Backend`): the way in which derivatives are computed.
        allow_mismatch (`Sequence[str]`): with "weights", the model may change between queries.
    """

    def __init__(
        self, bank: ResponseBank, model: nn.Module, parameters: TrackedParameters, backend: Backend,
        allow_mismatch: Sequence[str] = (),
    ):  # fmt: skip
        self.bank, self.model, self.parameters, self.backend = bank, model, parameters, backend
        self.objective = SEQUENCE_CLASSIFICATION if bank.manifest.objective == "sequence-classification" else CAUSAL_LM
        self._allowed, self._monitor = allow_mismatch, StateMonitor(model)
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
        if self.objective is not CAUSAL_LM:
            return classifier_batch(queries, self.model, self.device)
        check_queries(queries, self.model)
        return pad_queries(queries, self.device)

    def prepare(
        self, queries: Sequence[Query], two_stage: bool = False, also: Collection[str] = ()
    ) -> "_AtQueryWeights":
        """Pass queries through the model once, to be differentiated along directions as often as wanted.

        Args:
            two_stage (`bool`): rows are being chosen in two stages; see `Backend`.
            also (`Collection[str]`): layers that are recorded, too, for `take_recorded` of the result.

        Raises:
            MismatchError: weights or adapters of the model are no longer those of the bank.
        """
        if self._monitor.changed():  # perhaps: the same values may have been written again
            self.bank.check_model(self.model, self._allowed)
            self._monitor.renew()
        batch = self.batch(queries)
        with self._query_weights():
            prepared = self.backend.prepare(batch, two_stage, self.objective, also)
        return _AtQueryWeights(self._query_weights, prepared)

    @contextmanager
    def _query_weights(self) -> Iterator[None]:
        with self.bank.query_weights(self.model, self.parameters):
            yield
        if self.bank.manifest.averaging == "trajectory":
            self._monitor.renew()  # the weights were written there and back

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
            first, last = (min(start, held.start), max(end, held.stop)) if held else (start, end)
            read = self.bank.directions(lines=slice(first, last)).to(self.device)
            self._first, self._held = first, read  # together, so that a failed read changes nothing
        return self._held[start - self._first : end - self._first]


class _AtQueryWeights:
    """A prepared batch whose derivatives are taken at the weights where the bank's queries are read."""

    def __init__(self, query_weights: Callable[[], AbstractContextManager[None]], prepared: PreparedBatch):
        self._query_weights, self._prepared = query_weights, prepared

    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate along (k, P); (queries, positions, k)."""
        with self._query_weights():
            return self._prepared.jvp(directions, chunk)

    def take_recorded(self) -> RecordedPass | None:
        """Return the pass of these queries, and keep it no longer; None where the backend has recorded none."""
        recorded: RecordedPass | None = getattr(self._prepared, "recorded", None)
        if recorded is not None:
            setattr(self._prepared, "recorded", None)  # noqa: B010 (a protocol does not have it)
        return recorded
