"""Scores of rows in two stages, within a budget of forward passes.

In the first stage one plain forward pass predicts the query's gradient, where the bank has a predictor, or else what
to expect of its derivatives, and exact derivatives along a few directions say what remains of it. That gives estimates
of all rows by their coordinates. The rows that may be named are then estimated from their codes, and in the second
stage read exactly, in turns: each row is read along its own response, and tells of others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bank.codes import NOISE
from ..gradients.predicted_derivatives import column_groups, grouped_derivatives
from ..gradients.predictor import GradientPredictor, RecordedPass
from ..jvp.backend import PreparedBatch
from ..models.likelihood import CAUSAL_LM
from .derivatives import QueryDerivatives
from .direction_scorer import DirectionScorer
from .expected_derivatives import ExpectedDerivatives
from .gaussian_process import CandidateScores, GaussianProcess
from .held_rows import HeldRows
from .inputs import Query
from .ranking import RankedRows, finite
from .results import Attribution, Ranking
from .row_codes import HeldRowCodes
from .shortlist import MOST, refine


__all__ = ["TwoStageScorer"]

_PROGRESS_DELAY = 3.0  # seconds after which a progress bar appears
_FIRST_STAGE = 4  # one in so many passes goes to directions, the others to rows
_ADAPTIVE_DIRECTIONS = 16  # read in adaptive mode
_CANDIDATES = 8192, 32768  # rows whose codes are read, at least and at most
_LIKELY = 2048  # candidates among which rows are chosen in turns, at least
_CANDIDATES_SHARE = 8  # one in so many rows, between these
_CANDIDATES_PER_ROW = 16  # candidates for every row that is read exactly
_CANDIDATES_PER_NAME = 8  # candidates for every row that is named on either side


@dataclass
class _FirstStage:
    """Knowledge of one query after the first stage.

    Attributes:
        prepared (`PreparedBatch`): the query, ready to be differentiated.
        gradient (`Tensor`, *optional*): (1, P) predicted gradient.
        along (`Tensor`): (k,) predicted derivatives along the directions, zero where nothing is predicted; float64.
        process (`GaussianProcess`): what was observed of the rest.
    """

    prepared: PreparedBatch
    gradient: Tensor | None
    along: Tensor
    process: GaussianProcess

    @property
    def derivatives(self) -> Tensor:
        """(k,) estimated derivatives along the directions, float64."""
        return self.along + self.process.mean()


class TwoStageScorer:
    """Scores queries by estimates of all rows, and exact scores of those that matter.

    Args:
        derivatives (`QueryDerivatives`): differentiates queries.
        direction_scorer (`DirectionScorer`): scores sources that have directions.
        progress (`bool`, defaults to `False`): show a bar over queries that take more than a few seconds.
    """

    def __init__(self, derivatives: QueryDerivatives, direction_scorer: DirectionScorer, progress: bool = False):
        self._derivatives, self._direction_scorer, self._progress = derivatives, direction_scorer, progress
        self._bank, self._held = derivatives.bank, HeldRows(derivatives.bank)
        self._expected = ExpectedDerivatives(derivatives)
        self._groups = column_groups(derivatives.parameters.sizes)
        self._codes = HeldRowCodes(self._bank) if self._bank.manifest.row_codes else None

    def attribute(self, query: Query, top_k: int, budget: int | Literal["adaptive"]) -> Attribution:
        """Name rows on either side of one query, and score all sources."""
        manifest = self._bank.manifest
        ranking, stage = self._rank(query, top_k, budget, all_rows=False)
        if manifest.source_directions:
            sources = self._direction_scorer.source_scores([query], 1)[0]
        elif stage is None:
            sources = torch.zeros(len(manifest.sources), dtype=torch.float64)
            has_source = self._held.sources >= 0
            sources.index_add_(0, self._held.sources[has_source].long(), ranking.scores[has_source])
        else:
            sources = self._held.source_coordinates @ stage.derivatives
        passes = ranking.passes + manifest.source_directions
        return Attribution(ranking.proponents, ranking.opponents, sources, passes)

    def rank(self, query: Query, top_k: int, budget: int | Literal["adaptive"]) -> Ranking:
        """Name rows on either side of one query, and score all rows.

        The scores of named rows are exact up to their codes, or, if the bank has no row codes, up to what its
        directions keep. At least `top_k` rows on either side are read, whatever the budget. With `adaptive`, rows are
        read until no other is likely to be among them; see `refine`.
        """
        return self._rank(query, top_k, budget, all_rows=True)[0]

    def _rank(
        self, query: Query, top_k: int, budget: int | Literal["adaptive"], all_rows: bool
    ) -> tuple[Ranking, _FirstStage | None]:
        """Return the ranking, with the scores of `all_rows` or of none but those named, and the first stage."""
        if not self._bank.manifest.error_variances:
            assert budget != "adaptive"
            return self._rank_without_codes(query, top_k, budget), None
        wanted = _ADAPTIVE_DIRECTIONS if budget == "adaptive" else (budget - 1) // _FIRST_STAGE
        directions = self._directions_within(wanted)
        stage = self._first_stage(query, directions)
        rows = None if budget == "adaptive" else budget - 1 - directions
        candidates = self._candidates(stage, top_k, rows)
        estimated = self._candidate_scores(stage, candidates)
        likely = self._likely(estimated, top_k, rows)
        process, indices = estimated.narrowed(likely), candidates[likely]
        squares = torch.zeros(len(indices), dtype=torch.float64)
        with self._bar(rows, top_k) as bar:

            def read(positions: Tensor) -> Tensor:
                bar.update(len(positions))
                responses = self._responses(indices[positions])
                squares[positions] = self._codes_of_rows.squares(responses)
                return self._read(stage.prepared, responses)

            refined = refine(process.mean(), process, top_k, rows, read)
        read_rows, token_scores = indices[refined.row_indices], refined.token_scores
        ids, sources = self._bank.row_labels(read_rows)
        noise = self._code_noise(stage, squares[refined.row_indices])
        named = RankedRows(
            read_rows, ids, sources, token_scores.sum(0).float(), token_scores.T.float(), noise.float(),
            torch.ones(len(read_rows), dtype=torch.bool),
        )  # fmt: skip
        scores, stds = torch.zeros(0), None
        if all_rows:  # what was read tells of the rows that are no candidates, too
            scores, stds = estimated.mean(), estimated.std()
            if len(candidates) < len(self._bank):
                scores = self._estimates(stage).index_copy_(0, candidates, scores)
                stds = self._standard_deviations(stage).index_copy_(0, candidates, stds)
            stds *= process.surprise
            scores[read_rows], stds[read_rows] = token_scores.sum(0), noise
        passes = 1 + stage.process.observations
        return Ranking(named.top(top_k, 1.0), named.top(top_k, -1.0), scores, passes, stds), stage

    def scores(self, queries: Sequence[Query], budget: int, batch_size: int | None = None) -> Tensor:
        """Return scores of all rows (queries, rows), float32: predicted, then corrected along `budget - 1` directions.

        A bank whose directions are its rows (`directions="exact"`) has them read in order of their coarse scores.
        """
        if self._bank.manifest.exact and budget > 1:
            return torch.stack([self.rank(query, 1, budget).scores for query in queries]).float()
        step = batch_size or 8
        spent = self._directions_within(budget - 1)
        parts = [self._corrected(queries[at : at + step], spent) for at in range(0, len(queries), step)]
        return torch.cat(parts).float()

    def row_scores(self, query: Query, row_indices: Tensor) -> Tensor:
        """Return exact scores of chosen rows: (n,) nats, float64; a forward pass for each."""
        return self._read(self._derivatives.prepare([query]), self._responses(row_indices)).sum(0)

    def predicted_gradients(self, queries: Sequence[Query]) -> Tensor:
        """Return the predicted gradient of each query's log-likelihood: (queries, P), float32, on the CPU."""
        batch = self._derivatives.batch(queries)
        with self._bank.query_weights(self._derivatives.model, self._derivatives.parameters):
            return self._predictor(batch).cpu()

    def _predicted(self, recorded: RecordedPass) -> Tensor:
        """Return the predicted gradient (queries, P) of queries that passed the model, on the CPU."""
        with self._bank.query_weights(self._derivatives.model, self._derivatives.parameters):
            return self._predictor.predict(recorded).cpu()

    @cached_property
    def _predictor(self) -> GradientPredictor:
        model, parameters, device = self._derivatives.model, self._derivatives.parameters, self._derivatives.device
        projections = {name: table.to(device) for name, table in self._bank.error_projections().items()}
        return GradientPredictor(model, parameters, CAUSAL_LM, projections)

    def _first_stage(self, query: Query, directions: int) -> _FirstStage:
        """Predict one query's gradient, and read it exactly along the leading directions."""
        manifest = self._bank.manifest
        variances = torch.tensor(manifest.error_variances, dtype=torch.float64)
        gradient, grouped, along = None, None, torch.zeros_like(variances)
        if manifest.error_projections:
            prepared = self._derivatives.prepare([query], True, self._predictor.recorded_paths)
            recorded = prepared.take_recorded()  # the same pass serves both
            gradient = self.predicted_gradients([query]) if recorded is None else self._predicted(recorded)
            grouped = grouped_derivatives(gradient, self._row_directions(), self._groups)
            along = grouped.view(len(self._groups), -1).sum(0).double()
        else:
            prepared = self._derivatives.prepare([query], two_stage=True)
        process = GaussianProcess(variances, self._expected(query, grouped))
        if directions:
            values = prepared.jvp(self._derivatives.directions(slice(0, directions)))[0].double().sum(0).cpu()
            process.observe(torch.eye(directions, len(along)), values - along[:directions], torch.zeros(directions))
        return _FirstStage(prepared, gradient, along, process)

    def _estimates(self, stage: _FirstStage) -> Tensor:
        """Return estimates of all rows' scores by their coordinates, (rows,), float64."""
        derivatives = stage.derivatives.float()
        return finite(torch.cat([(coordinates @ derivatives).double() for coordinates in self._held.blocks()]))

    def _standard_deviations(self, stage: _FirstStage) -> Tensor:
        """Return the standard deviations of these estimates, (rows,), float64."""
        none = torch.zeros(1, dtype=torch.float64)
        along = torch.cat([stage.process.std(coordinates, none) for coordinates in self._held.blocks()])
        return (along.square() + self._outside_variance(stage)).sqrt()

    def _outside_variance(self, stage: _FirstStage) -> Tensor:
        """Return the variances (rows,) of what a query's derivatives along the directions cannot tell, float64."""
        outside = self._bank.manifest.outside_variance * self._magnitude(stage)
        return outside * self._held.outside.double().square()

    def _magnitude(self, stage: _FirstStage) -> float:
        """Return a query's squared derivatives along the directions over those of the training rows."""
        usual = self._bank.manifest.derivative_square
        return float(stage.derivatives.square().sum()) / usual if usual > 0 else 0.0

    def _candidates(self, stage: _FirstStage, top_k: int, rows: int | None) -> Tensor:
        """Return the ascending indices of the rows that may have the highest and the lowest scores."""
        least, most = _CANDIDATES
        wanted = min(max(least, len(self._bank) // _CANDIDATES_SHARE), most)
        count = max(wanted, self._wanted(top_k, rows))
        if count >= len(self._bank):
            return torch.arange(len(self._bank))
        return _extremes(self._estimates(stage), self._outside_variance(stage).sqrt(), count)

    def _candidate_scores(self, stage: _FirstStage, candidates: Tensor) -> CandidateScores:
        manifest, coordinates = self._bank.manifest, self._held.coordinates(candidates)
        predicted = torch.zeros(len(candidates), dtype=torch.float64)
        if stage.gradient is not None:
            predicted = self._codes_of_rows.products(stage.gradient, candidates)[0]
        own = manifest.outside_error_variance * self._held.outside[candidates].double().square()
        result = CandidateScores(stage.process, predicted, coordinates, own)
        finite(result.mean())
        return result

    def _likely(self, estimated: CandidateScores, top_k: int, rows: int | None) -> Tensor:
        """Return the ascending indices of the candidates among which rows are chosen to be read, best and worst."""
        count = max(_LIKELY, self._wanted(top_k, rows))
        if count >= len(estimated.predicted):
            return torch.arange(len(estimated.predicted))
        scores, stds = estimated.mean(), estimated.std().nan_to_num(posinf=0.0)
        return _extremes(scores, stds, count)

    @staticmethod
    def _wanted(top_k: int, rows: int | None) -> int:
        """Return how many candidates there must be, at least, for reading so many rows and naming `top_k`."""
        return max(_CANDIDATES_PER_ROW * (MOST if rows is None else rows), _CANDIDATES_PER_NAME * top_k)

    def _code_noise(self, stage: _FirstStage, squares: Tensor) -> Tensor:
        """Return the standard deviation (n,) that codes leave in scores along rows of these squared norms, float64."""
        manifest = self._bank.manifest
        if stage.gradient is None:
            square = manifest.gradient_square * self._magnitude(stage)
        else:
            square = self._codes_of_rows.square(stage.gradient)
        return (squares * (NOISE[manifest.row_code_bits] * square / manifest.size)).sqrt()

    @property
    def _codes_of_rows(self) -> HeldRowCodes:
        assert self._codes is not None, "only where the bank keeps row codes"
        return self._codes

    def _bar(self, rows: int | None, top_k: int) -> tqdm:
        total = max(MOST if rows is None else rows, 2 * top_k)
        return tqdm(total=total, unit="pass", delay=_PROGRESS_DELAY, disable=not self._progress, leave=False)

    def _rank_without_codes(self, query: Query, top_k: int, budget: int) -> Ranking:
        """Rank by coarse scores that directions correct, and read the best rows as far as the directions keep them."""
        prepared = self._derivatives.prepare([query], two_stage=True)
        directions = self._directions_within((budget - 1) // _FIRST_STAGE)
        estimate = self._corrected_by_directions([query], directions)[0]
        rows = budget - 1 - directions
        with self._bar(rows, top_k) as bar:

            def read(row_indices: Tensor) -> Tensor:
                bar.update(len(row_indices))
                return self._read(prepared, self._responses(row_indices))

            refined = refine(estimate, None, top_k, rows, read)
        index, token_scores = refined.row_indices, refined.token_scores
        ids, sources = self._bank.row_labels(index)
        exact = torch.full((len(index),), self._bank.manifest.exact)
        stds = torch.zeros(len(index)) if self._bank.manifest.exact else torch.full((len(index),), math.nan)
        named = RankedRows(index, ids, sources, token_scores.sum(0).float(), token_scores.T.float(), stds, exact)
        passes = 1 + directions + len(index)
        return Ranking(named.top(top_k, 1.0), named.top(top_k, -1.0), refined.scores, passes, None)

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
        return self._held.coordinates(row_indices) @ self._row_directions()

    def _read(self, prepared: PreparedBatch, responses: Tensor) -> Tensor:
        """Return the exact token scores along responses (n, P): (positions, n), float64, on the CPU."""
        return prepared.jvp(responses.to(self._derivatives.device))[0].double().cpu()

    def _corrected(self, queries: Sequence[Query], spent: int) -> Tensor:
        """Return predicted scores (queries, rows), float64, corrected by `spent` exact derivatives."""
        if not self._bank.manifest.error_variances:
            return self._corrected_by_directions(queries, spent)
        stages = [self._first_stage(query, spent) for query in queries]
        corrections = self._by_coordinates(torch.stack([stage.process.mean() for stage in stages]))
        gradients = [stage.gradient for stage in stages if stage.gradient is not None]
        return corrections + self._products(torch.cat(gradients)) if gradients else corrections

    def _corrected_by_directions(self, queries: Sequence[Query], count: int) -> Tensor:
        """Return coarse scores (queries, rows), float64, corrected along the bank's leading directions."""
        gradients = self.predicted_gradients(queries)
        coarse = self._products(gradients)
        if not count:
            return coarse
        exact = self._derivatives.along(queries, slice(0, count)).double().sum(1).cpu()
        return coarse + self._by_coordinates(exact - (gradients @ self._row_directions(count).T).double())


def _extremes(scores: Tensor, stds: Tensor, count: int) -> Tensor:
    """Return the ascending indices of the `count` highest and lowest scores, a standard deviation allowed."""
    highest, lowest = ((side * scores + stds).topk(count // 2).indices for side in (1.0, -1.0))
    return torch.cat([highest, lowest]).unique()
