"""Scores from one backward pass per query, for comparison: what forward passes save is measured against it.

This is the one place in queries where reverse mode is used, and only on request (`readout="backward"`). It needs
autograd through the model, which serving engines, compiled and quantised models do not have, and the memory of a
training step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank.codes import NOISE
from ..gradients.per_sample import PerSampleGradients
from .derivatives import QueryDerivatives
from .held_rows import HeldRows
from .inputs import Query
from .ranking import RankedRows
from .results import Attribution, Ranking
from .row_codes import HeldRowCodes


__all__ = ["BackwardScorer"]


class BackwardScorer:
    """Scores queries by their gradients times row codes, or times what directions keep of the rows.

    Args:
        derivatives (`QueryDerivatives`): the bank, the model and its batches.
    """

    def __init__(self, derivatives: QueryDerivatives):
        self._derivatives, self._bank = derivatives, derivatives.bank
        self._held = HeldRows(self._bank)
        self._codes = HeldRowCodes(self._bank) if self._bank.manifest.row_codes else None
        self._gradients = PerSampleGradients(derivatives.model, derivatives.parameters, derivatives.objective)

    def gradients(self, queries: Sequence[Query]) -> Tensor:
        """Return the gradient of each query's log-likelihood: (queries, P), float32, on the CPU."""
        batch = self._derivatives.batch(queries)
        with self._bank.query_weights(self._derivatives.model, self._derivatives.parameters), torch.enable_grad():
            return -self._gradients(batch)[0].detach().float().cpu()

    def scores(self, queries: Sequence[Query]) -> Tensor:
        """Return the scores of all rows: (queries, rows) nats, float64."""
        return self._row_scores(self.gradients(queries))

    def source_scores(self, queries: Sequence[Query]) -> Tensor:
        """Return the scores of all sources: (queries, sources) nats, float64."""
        return self._sources(self.gradients(queries))

    def rank(self, query: Query, top_k: int) -> Ranking:
        """Name rows on either side of one query, and score all rows; the rows named are read once more by token."""
        gradient = self.gradients([query])
        scores = self._row_scores(gradient)[0]
        proponents, opponents = (self._named(query, gradient, scores, top_k, sign) for sign in (1.0, -1.0))
        return Ranking(proponents, opponents, scores, 1 + len(proponents.ids) + len(opponents.ids))

    def attribute(self, query: Query, top_k: int) -> Attribution:
        """Name rows on either side of one query, and score all sources."""
        sources = self.source_scores([query])[0]
        if not top_k:
            return Attribution(RankedRows.empty(), RankedRows.empty(), sources, 1)
        ranking = self.rank(query, top_k)
        return Attribution(ranking.proponents, ranking.opponents, sources, ranking.passes)

    def _row_scores(self, gradients: Tensor) -> Tensor:
        if self._codes is not None:
            return self._codes.products(gradients)
        along = (gradients @ self._directions(0, self._bank.manifest.directions).T).double()
        return torch.cat([along @ block.double().T for _, _, block in self._bank.coordinates()], 1)

    def _sources(self, gradients: Tensor) -> Tensor:
        manifest = self._bank.manifest
        if manifest.source_directions:
            last = manifest.directions + manifest.source_directions
            along = (gradients @ self._directions(manifest.directions, last).T).double()
            return along * torch.tensor(manifest.source_scales, dtype=torch.float64)
        along = (gradients @ self._directions(0, manifest.directions).T).double()
        return along @ self._held.source_coordinates.T

    def _named(self, query: Query, gradient: Tensor, scores: Tensor, top_k: int, sign: float) -> RankedRows:
        """Return the first rows of one sign, with their scores by token along the rows' own responses."""
        manifest = self._bank.manifest
        rows = (sign * scores).topk(min(top_k, len(scores))).indices
        rows = rows[sign * scores[rows] > 0]
        ids, sources = self._bank.row_labels(rows)
        exact, stds = self._codes is not None or manifest.exact, torch.full((len(rows),), math.nan)
        if self._codes is not None:
            responses = self._codes.rows(rows)
            noise = NOISE[manifest.row_code_bits] * self._codes.square(gradient) / manifest.size
            stds = (self._codes.squares(responses) * noise).sqrt().float()
        else:
            responses = self._held.coordinates(rows) @ self._directions(0, manifest.directions)
        prepared = self._derivatives.prepare([query], two_stage=True)
        token_scores = prepared.jvp(responses.to(self._derivatives.device))[0].T.float().cpu()
        if manifest.exact:
            stds = torch.zeros(len(rows))
        return RankedRows(
            rows, ids, sources, scores[rows].float(), token_scores, stds, torch.full((len(rows),), exact)
        )

    def _directions(self, first: int, last: int) -> Tensor:
        return self._derivatives.directions(slice(first, last)).cpu()
