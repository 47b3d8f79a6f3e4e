"""The assembly of directions, coordinates, row codes and source responses from the passes, exactly or at low rank."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..bank.codes import RowCodes
from ..errors import UnsupportedError
from .exact_sources import ExactSources
from .low_rank import LowRankBasis, factorize, inner_products
from .passes import SEED_OFFSET, Passes
from .plan import Plan
from .responses import CodeSink, Estimation, Responses
from .sample_regression import RowFeatures, regress
from .storage import blocks


__all__ = ["Assembly", "Predict"]

Predict = Callable[[list[int], list[int]], Tensor | None]
"""Fits a gradient predictor on rows, and returns its gradients (n, own columns) of other rows; None if there is none.

It is called by all ranks, with the model at the weights for queries."""
_MAX_CURVATURE = 512  # samples per segment unless more are asked for
_MAX_EXACT = 16384  # directions of an exact bank
_FIT_ROWS = 512  # rows to fit a predictor on, at most: some dozens of tokens a row against d^2 numbers a projection
_HELD_OUT_ROWS = 32  # rows to judge the fit on, at most
_LEAST_SQUARE = 1e-4  # of the mean over parameters: below it, a parameter counts as if it were so large
_NEGLIGIBLE = 1e-10  # of a response's squared norm: rounding


class Assembly:
    """Choose the sample rows, run the passes and put the responses of the whole training set together.

    Args:
        passes (`Passes`): the passes, with the settings.
        sources (`ExactSources`, *optional*): sources that get an exact response.
        predicts (`bool`): whether `run` will be given a gradient predictor.

    Attributes:
        plan (`Plan`): rows and bytes that `run` takes.

    Raises:
        UnsupportedError: an exact bank would hold too many directions.
    """

    def __init__(self, passes: Passes, sources: ExactSources | None = None, predicts: bool = False):
        settings, total = passes.settings, len(passes.trained)
        self.passes, self.sources = passes, sources or ExactSources.none(total)
        self._exact = settings.directions == "exact"
        trained = passes.trained.nonzero().flatten()
        self.sample_rows = torch.arange(total)
        if self._exact:
            _refuse_too_many(total, passes.size)
        elif total > settings.sample_rows:
            generator = torch.Generator().manual_seed(SEED_OFFSET + settings.seed)
            order = torch.randperm(len(trained), generator=generator)
            self.sample_rows = trained[order[: settings.sample_rows]].sort().values
        samples = settings.curvature_samples
        rows = self.sample_rows.tolist()
        held_out = set(_spread(len(rows), _HELD_OUT_ROWS))
        self._held_out = sorted(held_out)
        fit = [at for at in _spread(len(rows), _FIT_ROWS + _HELD_OUT_ROWS) if at not in held_out] or self._held_out
        self._fit_rows = [rows[at] for at in fit]
        self.plan = Plan(
            rows=len(trained),
            size=passes.size,
            segment_rows=[
                0 if segment.visits is not None else int(segment.row_weights.ne(0).sum())
                for segment in passes.segments
            ],
            captured=sum(len(segment.visits) for segment in passes.segments if segment.visits is not None),
            curvature_samples=min(len(trained), _MAX_CURVATURE) if samples is None else samples,
            sample_rows=len(self.sample_rows),
            query_gradients=(len(held_out) if predicts else 0) if self._exact else len(self.sample_rows),
            ranks=passes.ranks.size,
            matrices=2 + (passes.segment_weights[-1] < 1) + (predicts and not self._exact),
            predictor_rows=predicts * (len(fit) + (len(held_out) if self._exact else len(rows))),
        )

    def run(
        self, predict: Predict | None = None, codes: CodeSink | None = None, features: RowFeatures | None = None
    ) -> Responses:
        """Run the passes; return the responses of the whole training set.

        Args:
            predict (`Callable`, *optional*): fits a gradient predictor and predicts; see `Predict`.
            codes (`Callable`, *optional*): takes the row codes, in order; see `CodeSink`.
            features (`Callable`, *optional*): features of rows, where nothing is predicted; see `RowFeatures`.
        """
        with self.passes.stream.progress(self.plan.row_passes + self.plan.captured):
            self.passes.measure_curvature(self.plan.curvature_samples)
            if self._exact:
                return self._exact_responses(predict)
            return self._low_rank_responses(predict, codes, features)

    def _exact_responses(self, predict: Predict | None) -> Responses:
        passes, total = self.passes, len(self.sample_rows)
        responses = passes.respond(self.sample_rows)
        explained = None if predict is None else self._judge(predict, responses)
        sources = torch.zeros(self.sources.count, passes.width, dtype=passes.theta.dtype)
        for lines in blocks(total, passes.chunk):
            self.sources.add(sources, self.sample_rows[lines], responses[lines])
        scales = passes.normalize(sources)
        if passes.size < total:  # the parameters themselves are the shorter list of directions
            directions, coordinates = torch.eye(passes.size), passes.gather(responses).float()
        else:
            coordinates = passes.normalize(responses)[:, None].float()
            directions = passes.gather(responses)
        return Responses(
            directions, coordinates, passes.gather(sources), scales, 1.0, True, self.plan.curvature_samples,
            predictor_explained_variance=explained,
        )  # fmt: skip

    def _judge(self, predict: Predict, responses: Tensor) -> float | None:
        """Return the share of held-out rows' score variance that is predicted; None if nothing is."""
        held_out = self.sample_rows[self._held_out]
        gradients = torch.zeros(len(held_out), self.passes.width, dtype=self.passes.theta.dtype)
        self.passes.read_gradients(held_out, gradients)
        predicted = predict(self._fit_rows, held_out.tolist())
        if predicted is None:
            return None
        both = (gradients, gradients - predicted)
        whole, errors = (self.passes.ranks.total(inner_products(part, responses)) for part in both)
        return _explained(whole, errors)

    def _low_rank_responses(
        self, predict: Predict | None, codes: CodeSink | None, features: RowFeatures | None
    ) -> Responses:
        passes, rows, settings = self.passes, self.sample_rows, self.passes.settings
        assert not isinstance(settings.directions, str)
        gradients = passes.zeros(len(rows))
        responses = passes.respond(rows, gradients)
        passes.read_gradients(rows, gradients)
        errors = None if predict is None else predict(self._fit_rows, rows.tolist())
        if errors is not None:
            errors = errors.to(gradients.dtype)
            for lines in blocks(len(rows), passes.chunk):
                errors[lines] = gradients[lines] - errors[lines]
        basis = factorize(
            gradients, responses, passes.diagonal, settings.directions, settings.seed, passes.ranks, errors
        )
        regressed = None if codes is None else regress(passes, rows, basis, gradients, errors, features)
        if regressed is not None:
            basis = replace(basis, error_variances=regressed.error_variances)
        explained = None
        if basis.scores.errors is not None:
            explained = _explained(*(part[self._held_out] for part in (basis.scores.whole, basis.scores.errors)))
        stream, estimation = _RowStream(passes, self.sources, rows, responses, basis), None
        if codes is not None:
            weights, square = _code_weights(passes, gradients, responses)
            stream.respond(codes, weights)
            estimation = stream.estimation(square)
        elif len(rows) < len(passes.trained) and passes.captures is None:
            stream.project()
        else:
            stream.respond()
        scales = passes.normalize(stream.sources)
        return Responses(
            passes.gather(basis.directions), stream.coordinates, passes.gather(stream.sources), scales,
            basis.explained_variance, False, self.plan.curvature_samples, estimation, explained, regressed,
        )  # fmt: skip


class _RowStream:
    """Coordinates, codes and sources of all rows, given the responses of sample rows and the basis.

    Args:
        passes (`Passes`): the passes.
        sources (`ExactSources`): sources that get an exact response.
        sample_rows (`Tensor`): (m,) ascending.
        responses (`Tensor`): (m, own columns).
        basis (`LowRankBasis`): directions in the own columns.

    Attributes:
        coordinates (`Tensor`): (rows, k).
        sources (`Tensor`): (sources, own columns) sums of responses.
    """

    def __init__(
        self, passes: Passes, sources: ExactSources, sample_rows: Tensor, responses: Tensor, basis: LowRankBasis
    ):
        self.passes, self.basis, self._sources = passes, basis, sources
        self._sample_rows, self._responses = sample_rows, responses
        total = len(passes.trained)
        self._place = torch.full((total,), -1)  # of a row among the sample rows
        self._place[sample_rows] = torch.arange(len(sample_rows))
        self.coordinates = passes.storage.zeros(total, len(basis.directions))
        self.outside = torch.zeros(total)
        self.sources = torch.zeros(sources.count, passes.width, dtype=passes.theta.dtype)

    def respond(self, codes: CodeSink | None = None, code_weights: Tensor | None = None) -> None:
        """Take the response of every row, in chunks, for its coordinates, codes and sources.

        Args:
            codes (`Callable`, *optional*): takes the row codes.
            code_weights (`Tensor`, *optional*): (P,) of row codes.
        """
        passes = self.passes
        pushes = torch.zeros(passes.chunk, passes.width, dtype=passes.theta.dtype)
        for lines in blocks(len(self._place), passes.chunk):
            rows = torch.arange(lines.start, lines.stop)
            positions = self._place[lines]
            others = (positions < 0) & passes.trained[lines]
            responses = torch.zeros(len(rows), passes.width, dtype=passes.theta.dtype)
            responses[positions >= 0] = self._responses[positions[positions >= 0]]
            if bool(others.any()):
                responses[others] = passes.respond(rows[others], pushes[: int(others.sum())], "responses of all rows")
            self._sources.add(self.sources, rows, responses)
            self._place_in_basis(lines, responses)
            if codes is not None:
                self._encode(responses, codes, code_weights)

    def project(self) -> None:
        """Take coordinates alone, in one walk of the adjoint basis; what is outside the directions stays unknown."""
        others = self.passes.trained.clone()
        others[self._sample_rows] = False
        own = self._sample_rows
        self.coordinates, self.sources = self.passes.project(
            self.basis.adjoint_basis, others.nonzero().flatten(), self._sources
        )
        self.coordinates[own] = self.basis.coordinates.float()
        for lines in blocks(len(own), self.passes.chunk):
            self._sources.add(self.sources, own[lines], self._responses[lines])

    def estimation(self, gradient_square: float) -> Estimation:
        """Return what scores are estimated with."""
        norms = self.outside[self._sample_rows].double().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        variances = [float(scores.mean() / norms) for scores in self.basis.outside_scores]
        if not bool(self.outside.any()):
            variances = [0.0, 0.0]
        return Estimation(
            self.outside, self.basis.error_variances, variances[0], variances[1], self.basis.derivative_square,
            gradient_square,
        )  # fmt: skip

    def _place_in_basis(self, lines: slice, responses: Tensor) -> None:
        """Note coordinates of a block of rows, and the norm of what is outside the directions."""
        ranks, basis, positions = self.passes.ranks, self.basis, self._place[lines]
        coordinates = ranks.total(inner_products(responses, basis.adjoint_basis))
        coordinates[positions >= 0] = basis.coordinates[positions[positions >= 0]]
        coordinates[~self.passes.trained[lines]] = 0.0
        self.coordinates[lines] = coordinates.float()
        remaining = responses - coordinates.to(responses.dtype) @ basis.directions
        diagonal = self.passes.diagonal.double()
        squares = torch.stack([(part.double().square() / diagonal).sum(1) for part in (remaining, responses)])
        outside, whole = ranks.total(squares)
        self.outside[lines] = torch.where(outside > _NEGLIGIBLE * whole, outside, 0.0).sqrt().float()

    def _encode(self, responses: Tensor, sink: CodeSink, weights: Tensor | None) -> None:
        """Encode a block of rows, each rank its share, and give the codes to the sink on rank 0."""
        ranks, bits = self.passes.ranks, self.passes.settings.code_bits
        share = RowCodes.of(ranks.share_rows(responses, self.passes.size), bits, weights)
        codes, scales = (ranks.gather_rows(part, len(responses)) for part in (share.codes, share.scales))
        with ranks.raise_on_all_ranks():
            if ranks.rank == 0:
                sink(RowCodes(codes, scales, bits, self.passes.size, weights))


def _code_weights(passes: Passes, gradients: Tensor, responses: Tensor) -> tuple[Tensor, float]:
    """Return the weights (P,) of row codes, and the mean squared norm of a weighed gradient.

    The square of a weight is the usual size of a gradient's number over that of a response's, about one on average.
    """
    squares = torch.zeros(2, passes.width, dtype=torch.float64)
    for lines in blocks(len(gradients), passes.chunk):
        squares += torch.stack([part[lines].double().square().sum(0) for part in (gradients, responses)])
    squares = passes.ranks.spread_columns(squares / max(len(gradients), 1), passes.size)
    floor = _LEAST_SQUARE * squares.mean(1, keepdim=True)
    gradient, response = (squares + floor).clamp(min=torch.finfo(torch.float32).tiny)
    weights = (gradient / response).sqrt().sqrt()
    weights = (weights / weights.log().mean().exp()).float()
    return weights, float((squares[0] / weights.double().square()).sum())


def _explained(whole: Tensor, errors: Tensor) -> float:
    """Return the share of the squares of scores that errors leave out; may be negative."""
    return 1.0 - float(errors.square().sum() / whole.square().sum().clamp(min=1e-30))


def _spread(total: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly spread over `total`."""
    return sorted({round(at * (total - 1) / max(count - 1, 1)) for at in range(min(count, total))})


def _refuse_too_many(rows: int, size: int) -> None:
    count = min(rows, size)
    if count > _MAX_EXACT:
        raise UnsupportedError(
            f"directions='exact': an exact bank of {rows} rows and {size} tracked parameters would hold {count} "
            f"directions; at most {_MAX_EXACT} are kept. Ask for a number of directions instead"
        )
