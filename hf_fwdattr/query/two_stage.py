"""Scores of rows in two stages, within a budget of forward passes.

In the first stage one plain forward pass predicts the query's gradient, whose products with the row responses are
coarse scores of all rows. Exact derivatives along linear combinations of rows (or along a few directions) correct them
where the prediction errs most for most queries. In the second stage the rows on a shortlist are read exactly, each
along its own response.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..gradients.predictor import GradientPredictor
from ..jvp.backend import PreparedBatch
from ..models.likelihood import CAUSAL_LM
from .derivatives import QueryDerivatives
from .direction_scorer import DirectionScorer
from .gaussian_process import GaussianProcess
from .inputs import Query
from .ranking import RankedRows
from .results import Attribution, Ranking
from .row_codes import HeldRowCodes
from .shortlist import MOST, refine


__all__ = ["TwoStageScorer"]

_PROGRESS_DELAY = 3.0  # seconds after which a progress bar appears
_FIRST_STAGE = 4  # one in so many passes goes to linear combinations or directions, the others to rows
_ADAPTIVE_COMBINATIONS = 16  # linear combinations read in adaptive mode


class TwoStageScorer:
    """Scores queries by coarse scores of all rows, and exact scores of those that matter.

    Args:
        derivatives (`QueryDerivatives`): differentiates queries.
        direction_scorer (`DirectionScorer`): scores sources that have directions.
        progress (`bool`, defaults to `False`): show a bar over queries that take more than a few seconds.
    """

    def __init__(self, derivatives: QueryDerivatives, direction_scorer: DirectionScorer, progress: bool = False):
        self._derivatives, self._direction_scorer, self._progress = derivatives, direction_scorer, progress
        self._bank = derivatives.bank
        self._codes = HeldRowCodes(self._bank) if self._bank.manifest.row_codes else None

    def attribute(self, query: Query, top_k: int, budget: int | Literal["adaptive"]) -> Attribution:
        """Name rows on either side of one query, and score all sources."""
        manifest = self._bank.manifest
        ranking = self.rank(query, top_k, budget)
        if manifest.source_directions:
            sources = self._direction_scorer.source_scores([query], 1)[0]
        else:
            sources = torch.zeros(len(manifest.sources), dtype=torch.float64)
            _, row_sources = self._row_labels
            has_source = row_sources >= 0
            sources.index_add_(0, row_sources[has_source].long(), ranking.scores[has_source])
        passes = ranking.passes + manifest.source_directions
        return Attribution(ranking.proponents, ranking.opponents, sources, passes)

    def rank(self, query: Query, top_k: int, budget: int | Literal["adaptive"]) -> Ranking:
        """Name rows on either side of one query, and score all rows.

        The scores of named rows are exact up to the eighth bit of their codes, or, if the bank has no row codes, up to
        what its directions keep. At least `top_k` rows on either side are read, whatever the budget. With `adaptive`,
        rows are read until no other is likely to be among them; see `refine`.
        """
        after_coarse = None if budget == "adaptive" else budget - 1
        prepared = self._derivatives.prepare([query], two_stage=True)
        process = None
        if self._learns:
            first_stage = _ADAPTIVE_COMBINATIONS if after_coarse is None else after_coarse // _FIRST_STAGE
            process = self._posterior(prepared, self.coarse_scores([query])[0], first_stage)
            estimate = process.mean()
        else:
            assert after_coarse is not None
            first_stage = self._directions_within(after_coarse // _FIRST_STAGE)
            estimate = self._corrected_by_directions([query], first_stage)[0]
        rows = None if after_coarse is None else after_coarse - first_stage
        total = max(MOST if rows is None else rows, 2 * top_k)
        disable = not self._progress
        with tqdm(total=total, unit="pass", delay=_PROGRESS_DELAY, disable=disable, leave=False) as bar:

            def read(row_indices: Tensor) -> Tensor:
                token_scores = self._exact(prepared, row_indices)
                bar.update(len(row_indices))
                return token_scores

            refined = refine(estimate, process, top_k, rows, read)
        ids, sources = self._row_labels
        index, token_scores = refined.row_indices, refined.token_scores
        named = RankedRows(index, ids[index], sources[index], token_scores.sum(0).float(), token_scores.T.float())
        passes = 1 + (first_stage + len(index) if process is None else process.observations)
        return Ranking(named.top(top_k, 1.0), named.top(top_k, -1.0), refined.scores, passes)

    def scores(self, queries: Sequence[Query], budget: int, batch_size: int | None = None) -> Tensor:
        """Return scores of all rows (queries, rows), float32: coarse, then corrected along `budget - 1` directions.

        Directions are linear combinations of rows where the bank holds an error covariance, else its own. A bank whose
        directions are its rows (`directions="exact"`) has them read in order of their coarse scores.
        """
        if self._bank.manifest.exact and budget > 1:
            return torch.stack([self.rank(query, 1, budget).scores for query in queries]).float()
        step = batch_size or 8
        spent = budget - 1 if self._learns else self._directions_within(budget - 1)
        parts = [self._corrected(queries[at : at + step], spent) for at in range(0, len(queries), step)]
        return torch.cat(parts).float()

    def row_scores(self, query: Query, row_indices: Tensor) -> Tensor:
        """Return exact scores of chosen rows: (n,) nats, float64; a forward pass for each."""
        return self._exact(self._derivatives.prepare([query]), row_indices).sum(0)

    def coarse_scores(self, queries: Sequence[Query]) -> Tensor:
        """Return predicted gradients times row responses: (queries, rows) nats, float64; one forward pass."""
        return self._products(self.predicted_gradients(queries))

    def predicted_gradients(self, queries: Sequence[Query]) -> Tensor:
        """Return the predicted gradient of each query's log-likelihood: (queries, P), float32, on the CPU."""
        batch = self._derivatives.batch(queries)
        with self._bank.query_weights(self._derivatives.model, self._derivatives.parameters):
            return self._predictor(batch).cpu()

    @cached_property
    def _predictor(self) -> GradientPredictor:
        model, parameters, device = self._derivatives.model, self._derivatives.parameters, self._derivatives.device
        projections = {name: table.to(device) for name, table in self._bank.error_projections().items()}
        return GradientPredictor(model, parameters, CAUSAL_LM, projections)

    @cached_property
    def _row_labels(self) -> tuple[Tensor, Tensor]:
        """Ids and sources of all rows, (rows,) each: twelve bytes a row, kept between queries."""
        parts = [(ids.clone(), sources.clone()) for ids, sources, _ in self._bank.coordinates(checked=False)]
        return torch.cat([ids for ids, _ in parts]), torch.cat([sources for _, sources in parts])

    @property
    def _learns(self) -> bool:
        """Return whether exact scores of rows improve the estimates of others, by a Gaussian process."""
        return self._codes is not None and self._codes.error_covariance is not None

    def _directions_within(self, passes: int) -> int:
        """Return the bank's directions read in so many passes; none if they are rows, which are in no order."""
        return 0 if self._bank.manifest.exact else min(passes, self._bank.manifest.directions)

    def _row_directions(self, count: int | None = None) -> Tensor:
        """Return the leading directions of rows (k, P) on the CPU; all by default."""
        count = self._bank.manifest.directions if count is None else count
        return self._derivatives.directions(slice(0, count)).cpu()

    def _products(self, gradients: Tensor) -> Tensor:
        """Return gradients (queries, P) times row responses: (queries, rows), float64."""
        if self._codes is not None:
            return self._codes.products(gradients)
        return self._by_coordinates((gradients @ self._row_directions().T).double())

    def _by_coordinates(self, derivatives: Tensor) -> Tensor:
        """Return (queries, rows) from derivatives (queries, k) along the leading directions, float64."""
        blocks = [block[:, : derivatives.shape[1]].double() for _, _, block in self._bank.coordinates()]
        return torch.cat([derivatives @ block.T for block in blocks], dim=1)

    def _responses(self, row_indices: Tensor) -> Tensor:
        """Return the responses (n, P) of ascending rows: decoded, or what the directions keep of them."""
        if self._codes is not None:
            return self._codes.rows(row_indices)
        parts, start = [], 0
        for _, _, block in self._bank.coordinates():
            inside = row_indices[(row_indices >= start) & (row_indices < start + len(block))]
            parts.append(block[inside - start])
            start += len(block)
        return torch.cat(parts) @ self._row_directions()

    def _exact(self, prepared: PreparedBatch, row_indices: Tensor) -> Tensor:
        """Return the exact token scores of ascending rows: (positions, n), float64, on the CPU."""
        responses = self._responses(row_indices).to(self._derivatives.device)
        return prepared.jvp(responses)[0].double().cpu()

    def _posterior(self, prepared: PreparedBatch, coarse: Tensor, count: int) -> GaussianProcess:
        """Return the Gaussian process of one query after its coarse scores (rows,) and `count` combinations."""
        assert self._codes is not None
        assert self._codes.error_covariance is not None
        process = GaussianProcess(coarse, self._codes.error_covariance)
        if count:
            weights, responses = self._codes.combinations(count)
            values = prepared.jvp(responses.to(self._derivatives.device))[0].double().sum(0).cpu()
            process.observe_combinations(weights, values)
        return process

    def _corrected(self, queries: Sequence[Query], spent: int) -> Tensor:
        """Return coarse scores (queries, rows), float64, corrected by `spent` exact derivatives."""
        if not self._learns:
            return self._corrected_by_directions(queries, spent)
        coarse = self.coarse_scores(queries)
        if not spent:
            return coarse
        return torch.stack(
            [
                self._posterior(self._derivatives.prepare([query], two_stage=True), prior, spent).mean()
                for query, prior in zip(queries, coarse, strict=True)
            ]
        )

    def _corrected_by_directions(self, queries: Sequence[Query], count: int) -> Tensor:
        """Return coarse scores (queries, rows), float64, corrected along the bank's leading directions."""
        gradients = self.predicted_gradients(queries)
        coarse = self._products(gradients)
        if not count:
            return coarse
        exact = self._derivatives.along(queries, slice(0, count)).double().sum(1).cpu()
        return coarse + self._by_coordinates(exact - (gradients @ self._row_directions(count).T).double())
