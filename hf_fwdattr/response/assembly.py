"""The assembly of directions, coordinates and source responses from the passes, exactly or at low rank."""

import torch
from torch import Tensor

from ..bank.codes import RowCodes
from ..errors import UnsupportedError
from .exact_sources import ExactSources
from .low_rank import factorize
from .passes import SEED_OFFSET, Passes
from .plan import Plan
from .responses import Responses
from .storage import blocks


__all__ = ["Assembly"]

_MAX_CURVATURE = 4096  # samples per segment unless more are asked for
_MAX_EXACT = 16384  # directions of an exact bank; beyond, its coordinates alone would fill the memory


class Assembly:
    """Choose the sample rows, run the passes and put the responses of the whole training set together.

    Args:
        passes (`Passes`): the passes, with the settings.
        sources (`ExactSources`, *optional*): sources that get an exact response.

    Attributes:
        plan (`Plan`): rows and bytes that `run` takes.

    Raises:
        UnsupportedError: an exact bank would hold too many directions.
    """

    def __init__(self, passes: Passes, sources: ExactSources | None = None):
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
        self.plan = Plan(
            rows=max(len(trained), len(self.sample_rows)),
            size=passes.size,
            segments=len(passes.segments),
            curvature_samples=min(len(trained), _MAX_CURVATURE) if samples is None else samples,
            sample_rows=len(self.sample_rows),
            query_gradients=not self._exact,
            ranks=passes.ranks.size,
            averaged=passes.segment_weights[-1] < 1,
        )

    def run(self) -> Responses:
        """Run the passes; return the responses of the whole training set."""
        with self.passes.stream.progress(self.plan.row_passes):
            self.passes.measure_curvature(self.plan.curvature_samples)
            return self._exact_responses() if self._exact else self._low_rank_responses()

    def _exact_responses(self) -> Responses:
        passes, total = self.passes, len(self.sample_rows)
        responses = passes.respond(self.sample_rows, passes.zeros(total))
        sources = self._source_sums(responses)
        scales = passes.normalize(sources)
        if passes.size < total:  # the parameters themselves are the shorter list of directions
            directions, coordinates = torch.eye(passes.size), passes.gather(responses).float()
        else:
            coordinates = torch.diag(passes.normalize(responses)).float()
            directions = passes.gather(responses)
        samples = self.plan.curvature_samples
        return Responses(directions, coordinates, passes.gather(sources), scales, 1.0, True, samples)

    def _low_rank_responses(self) -> Responses:
        passes, rows, settings = self.passes, self.sample_rows, self.passes.settings
        total = len(passes.trained)
        assert not isinstance(settings.directions, str)
        gradients = passes.zeros(len(rows))
        responses = passes.respond(rows, gradients)
        passes.read_gradients(rows, gradients)
        basis = factorize(gradients, responses, passes.diagonal, settings.directions, settings.seed, passes.ranks)
        sources, coordinates = self._source_sums(responses), basis.coordinates.float()
        if len(rows) < total:
            others = passes.trained.clone()
            others[rows] = False
            coordinates, sums = passes.project(basis.adjoint_basis, others.nonzero().flatten(), self.sources)
            coordinates[rows] = basis.coordinates.float()
            sources += sums
        coordinates[~passes.trained] = 0.0
        encoded = len(rows) == total and total * passes.size <= settings.code_budget
        codes = self._encode(responses) if encoded else None
        scales = passes.normalize(sources)
        return Responses(
            passes.gather(basis.directions), coordinates, passes.gather(sources), scales, basis.explained_variance,
            False, self.plan.curvature_samples, codes, None if codes is None else -basis.scores,
        )  # fmt: skip

    def _source_sums(self, responses: Tensor) -> Tensor:
        """Return the sums (sources, own columns) of the sample rows' responses."""
        sums = torch.zeros(self.sources.count, self.passes.width, dtype=self.passes.theta.dtype)
        for lines in blocks(len(responses), self.passes.chunk):
            self.sources.add(sums, self.sample_rows[lines], responses[lines])
        return sums

    def _encode(self, responses: Tensor) -> RowCodes | None:
        """Return the row codes of responses (rows, own columns) on rank 0, and None on other ranks."""
        parts = []
        for lines in blocks(len(responses), self.passes.chunk):
            whole = self.passes.gather(responses[lines])
            if self.passes.ranks.rank == 0:
                parts.append(RowCodes.of(whole))
        if not parts:
            return None
        return RowCodes(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def _refuse_too_many(rows: int, size: int) -> None:
    count = min(rows, size)
    if count > _MAX_EXACT:
        raise UnsupportedError(
            f"directions='exact': an exact bank of {rows} rows and {size} tracked parameters would hold {count} "
            f"directions; at most {_MAX_EXACT} are kept. Ask for a number of directions instead"
        )
