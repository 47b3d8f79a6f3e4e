"""Scores of rows and sources from derivatives along all of a bank's directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .derivatives import QueryDerivatives
from .inputs import Query
from .ranking import RankedRows, rank, scores, source_coordinates
from .results import Attribution, Ranking


__all__ = ["DirectionScorer"]


class DirectionScorer:
    """Scores queries by one forward pass for each of the bank's directions.

    Args:
        derivatives (`QueryDerivatives`): differentiates queries.
    """

    def __init__(self, derivatives: QueryDerivatives):
        self._derivatives, self._bank = derivatives, derivatives.bank

    def scores(self, queries: Sequence[Query], batch_size: int | None = None) -> Tensor:
        """Return the scores of all rows: (queries, rows) in nats, float32, on the CPU."""
        summed = self._summed(queries, slice(0, self._bank.manifest.directions), batch_size)
        return scores(summed[:, None], self._bank.coordinates(checked=False))

    def source_scores(self, queries: Sequence[Query], batch_size: int | None = None) -> Tensor:
        """Return the scores of all sources: (queries, sources) in nats, float64, on the CPU.

        Only the sources' own directions are read, where the bank has them.
        """
        return self._per_source(self._summed(queries, self._lines(rows=False), batch_size))

    def attribute(self, queries: Sequence[Query], top_k: int) -> list[Attribution]:
        """Name rows on either side, and score all sources; with `top_k` 0 only what sources need is read."""
        lines, manifest = self._lines(rows=top_k > 0), self._bank.manifest
        results = []
        for values in self._derivatives.along(queries, lines):
            sides = RankedRows.empty(len(values)), RankedRows.empty(len(values))
            if top_k:
                rows = values[None, :, : manifest.directions]
                (sides,) = rank(rows, self._bank.coordinates(checked=False), top_k, manifest.exact)
            summed = values.double().sum(0, keepdim=True).cpu()
            sources = self._per_source(summed[:, -manifest.source_directions :])[0]
            results.append(Attribution(*sides, sources, 1 + values.shape[-1]))
        return results

    def rank(self, query: Query, top_k: int) -> Ranking:
        """Name rows on either side of one query, and score all rows."""
        values = self._derivatives.along([query], slice(0, self._bank.manifest.directions))
        exact = self._bank.manifest.exact
        ((proponents, opponents),) = rank(values, self._bank.coordinates(checked=False), top_k, exact)
        all_scores = scores(values, self._bank.coordinates(checked=False))[0].double()
        return Ranking(proponents, opponents, all_scores, 1 + values.shape[-1])

    def _lines(self, rows: bool) -> slice:
        """Return the directions that rows and sources take, or those that sources take."""
        manifest = self._bank.manifest
        return slice(0 if rows or not manifest.source_directions else manifest.directions, None)

    def _summed(self, queries: Sequence[Query], lines: slice, batch_size: int | None) -> Tensor:
        """Return derivatives summed over output tokens: (queries, lines), float64, on the CPU."""
        step = batch_size or (8 if self._derivatives.device.type == "cuda" else 1)
        parts = [
            self._derivatives.along(queries[at : at + step], lines).double().sum(1)
            for at in range(0, len(queries), step)
        ]
        return torch.cat(parts).cpu()

    def _per_source(self, summed: Tensor) -> Tensor:
        """Return (queries, sources) from summed derivatives.

        Exact where sources have directions, which `summed` then belongs to; else from their rows' coordinates.
        """
        manifest = self._bank.manifest
        if manifest.source_directions:
            return summed * torch.tensor(manifest.source_scales, dtype=torch.float64)
        return summed @ source_coordinates(self._bank.coordinates(), len(manifest.sources)).T
