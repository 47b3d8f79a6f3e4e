"""The passes over the training set: curvature, responses, gradients at the end, and coordinates.

A segment takes a pass for its curvature, with sampled labels, and one for the responses of rows whose gradients were
not captured while training; one more pass takes the gradients that stand in for queries. No matrix of size rows x P is
held unless the bank is to be exact, and then it may be on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import QueryError
from .averaging import segment_weights
from .captures import Captures
from .curvature import Curvature
from .exact_sources import ExactSources
from .gradient_stream import GradientStream
from .segment import Segment, Visits
from .storage import Storage, blocks, rows_in_flight


__all__ = ["SEED_OFFSET", "PassSettings", "Passes"]

_CHUNK = 256  # rows that pass through a segment together, if memory allows
SEED_OFFSET = 0x5A17 << 16  # so that no seed draws the rows that training with the same seed saw first


@dataclass(frozen=True)
class PassSettings:
    """Settings of the passes.

    Attributes:
        directions (`int`, `float` or `str`): k, an explained variance below 1, or `exact`.
        curvature_samples (`int`, *optional*): M per segment; by default one per row trained on, at most 512.
        sample_rows (`int`): m, rows from which the directions are found.
        code_bits (`int`): bits of a number in row codes; 0 keeps none.
        averaging (`str`): `none` or `trajectory`; see `averaging`.
        smoothing (`float`): label smoothing of the training loss; outputs are always read by their likelihood.
        seed (`int`): of sampled labels and of sample rows.
    """

    directions: int | float | str = 128
    curvature_samples: int | None = None
    sample_rows: int = 1024
    code_bits: int = 0
    averaging: str = "none"
    smoothing: float = 0.0
    seed: int = 0


class Passes:
    """Run single passes over the training set; use inside `frozen(model)`.

    Args:
        stream (`GradientStream`): gradients of the training rows.
        segments (`Sequence[Segment]`): the recorded run, first to last.
        theta (`Tensor`): (P,) tracked parameters at which queries are read; see `averaging.query_theta`.
        storage (`Storage`): where large matrices go.
        settings (`PassSettings`, *optional*): settings.
        captures (`Captures`, *optional*): the gradients that training took; then every segment has its `visits`, and
            no row is read for its response.

    Attributes:
        trained (`Tensor`): (rows,) whether any segment saw the row.
        width (`int`): columns of P that this rank holds.

    Raises:
        QueryError: no row was trained on.
    """

    def __init__(
        self,
        stream: GradientStream,
        segments: Sequence[Segment],
        theta: Tensor,
        storage: Storage,
        settings: PassSettings | None = None,
        captures: Captures | None = None,
    ):
        self.stream, self.ranks, self.storage = stream, stream.ranks, storage
        self.theta, self.settings, self.captures = theta.cpu(), settings or PassSettings(), captures
        self.size = stream.parameters.size
        self._columns = self.ranks.columns(self.size)
        self.width = self._columns.stop - self._columns.start
        self.segment_weights = segment_weights(self.settings.averaging, len(segments))
        self.segments = [replace(segment, diagonal=segment.diagonal[self._columns]) for segment in segments]
        self.trained = torch.stack([segment.row_weights for segment in segments]).ne(0).any(0)
        if not bool(self.trained.any()):
            raise QueryError(
                "no row was seen in training, so every response is zero; pass the training set of the run"
            )
        self.chunk = min(_CHUNK, rows_in_flight(storage.budget, self.width, self.theta.dtype))

    @property
    def columns(self) -> slice:
        """Columns of P that this rank holds."""
        return self._columns

    @property
    def diagonal(self) -> Tensor:
        """Diagonal D of the last segment, (own columns,): the metric of directions."""
        return self.segments[-1].diagonal

    def zeros(self, rows: int) -> Tensor:
        """Return a zero matrix (rows, own columns), on disk where memory does not suffice."""
        return self.storage.zeros(rows, self.width, self.theta.dtype)

    def gather(self, part: Tensor) -> Tensor:
        """Return (n, P) on rank 0 from every rank's (n, own columns)."""
        return self.ranks.gather_columns(part, self.size)

    def measure_curvature(self, samples: int) -> None:
        """Set each segment's [`Curvature`] from `samples` gradients with labels sampled from the model."""
        trained = self.trained.nonzero().flatten()
        generator = torch.Generator().manual_seed(SEED_OFFSET + self.settings.seed)
        order = trained[torch.randperm(len(trained), generator=generator)]
        for number, segment in enumerate(self.segments):
            factor = self.zeros(samples)
            tokens, root = torch.zeros(1, dtype=torch.int64), segment.diagonal.sqrt()
            for start in range(0, samples, len(order)):
                row_indices = order[: samples - start].sort().values
                title, key = self._title("curvature", number), (self.settings.seed, number, start)
                for at, gradients, count in self.stream.by_columns(segment.theta, row_indices, title, key):
                    factor[start + at] = gradients * root
                    tokens += count
            self.ranks.total(tokens)
            for lines in blocks(samples, self.chunk):
                factor[lines] /= max(int(tokens), 1) ** 0.5
            segment.curvature = Curvature(factor, segment.weight_decay, sampled=True, ranks=self.ranks)

    def respond(self, row_indices: Tensor, pushes: Tensor | None = None, title: str = "") -> Tensor:
        """Return the responses (n, own columns) of the rows (n,); `pushes` is scratch memory of the same shape.

        A row's gradients are taken in the segments that saw it, and in no others, or come from the captured ones.
        `title` is that of the progress bar, by default one for each segment.
        """
        if self.captures is not None:
            return self._respond_captured(row_indices, title or "responses")
        pushes = self.zeros(len(row_indices)) if pushes is None else pushes
        allocate = self.zeros if len(row_indices) > self.chunk else self._zeros_in_memory
        responses = allocate(len(row_indices))
        averaged = self.segment_weights[-1] < 1.0
        mean = allocate(len(row_indices)) if averaged else responses
        for number, segment in enumerate(self.segments):
            weights = segment.row_weights[row_indices].to(pushes.dtype)[:, None]
            seen, shown = weights[:, 0].nonzero().flatten(), title or self._title("responses", number)
            if len(seen) < len(row_indices):
                pushes.zero_()
            smoothing = self.settings.smoothing
            stream = self.stream.by_columns(segment.theta, row_indices[seen], shown, smoothing=smoothing)
            for at, gradients, _ in stream:
                pushes[seen[at]] = gradients * weights[seen[at]]
            for lines in blocks(len(row_indices), self.chunk):
                earlier = responses[lines] if number else None
                responses[lines] = segment.propagate(earlier, pushes[lines])
                if averaged:
                    mean[lines] += self.segment_weights[number] * responses[lines]
        return mean

    def _respond_captured(self, row_indices: Tensor, title: str) -> Tensor:
        """Return the responses (n, own columns) of the rows (n,) from the gradients that training took of them."""
        result = self.zeros(len(row_indices)) if len(row_indices) > self.chunk else None
        for lines in blocks(len(row_indices), self.chunk):
            responses = self._zeros_in_memory(len(row_indices[lines]))
            mean, moved = torch.zeros_like(responses), torch.zeros(len(responses), dtype=torch.bool)
            for segment, weight in zip(self.segments, self.segment_weights, strict=True):
                assert segment.visits is not None, "with captured gradients every segment has its visits"
                visits, at = segment.visits.of(row_indices[lines])
                moved[at] = True
                active = moved.nonzero().flatten()
                if len(active):
                    place = torch.searchsorted(active, at)
                    responses[active] = self._propagate(segment, responses[active], visits, place)
                self.stream.advance(title, len(visits))
                mean += weight * responses
            if result is None:
                return mean
            result[lines] = mean
        return self._zeros_in_memory(0) if result is None else result

    def _propagate(self, segment: Segment, earlier: Tensor, visits: Visits, lines: Tensor) -> Tensor:
        """Return the responses after a segment, so many visits at a time."""
        result = None
        for some in blocks(len(visits), self.chunk) or [slice(0)]:
            gradients = self._captured(visits.captured[some])
            result_of = segment.propagate_visits(earlier, gradients, visits[some], lines[some])
            result = result_of if result is None else result.add_(result_of)
            earlier = torch.zeros_like(earlier)
        assert result is not None
        return result

    def _captured(self, positions: Tensor) -> Tensor:
        """Return captured gradients (n, own columns); each rank reads its share of them."""
        assert self.captures is not None
        own = torch.arange(self.ranks.rank, len(positions), self.ranks.size)
        with self.ranks.raise_on_all_ranks():
            read = self.captures.read(positions[own]).to(self.theta.dtype)
        at, gradients = self.ranks.exchange(own, read, max(1, -(-len(positions) // self.ranks.size)))
        result = torch.empty_like(gradients)
        result[at] = gradients
        return result

    def _zeros_in_memory(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.width, dtype=self.theta.dtype)

    def read_gradients(self, row_indices: Tensor, result: Tensor) -> None:
        """Fill `result` (n, own columns) with gradients of the rows' log-likelihood at the weights for queries."""
        for at, gradients, _ in self.stream.by_columns(self.theta, row_indices, "gradients at the end"):
            result[at] = -gradients

    def project(self, adjoint_basis: Tensor, row_indices: Tensor, sources: ExactSources) -> tuple[Tensor, Tensor]:
        """Return coordinates (all rows, k), zero but for the rows (n,), and sums (sources, own columns) of responses.

        No response is formed: the adjoint basis walks backwards through the segments once; then one pass per
        segment streams the rows, and each rank multiplies its own rows in all columns.
        """
        adjoints, basis = [], torch.zeros((), dtype=adjoint_basis.dtype)
        for segment, weight in zip(reversed(self.segments), reversed(self.segment_weights), strict=True):
            adjoint, basis = segment.adjoint(basis + weight * adjoint_basis)
            adjoints.append(adjoint)
        coordinates = self.storage.zeros(len(self.trained), len(adjoint_basis))
        responses = torch.zeros(sources.count, self.width, dtype=self.theta.dtype)
        mean = torch.zeros_like(responses)
        for number, (segment, own_columns) in enumerate(zip(self.segments, reversed(adjoints), strict=True)):
            adjoint = self.ranks.spread_columns(own_columns, self.size)
            pushes = torch.zeros(sources.count, self.size, dtype=self.theta.dtype)
            title, smoothing = self._title("coordinates", number), self.settings.smoothing
            with self.ranks.raise_on_all_ranks():
                for at, gradients, _ in self.stream.by_rows(segment.theta, row_indices, title, smoothing=smoothing):
                    gradients *= segment.row_weights[at].to(gradients.dtype)[:, None]
                    coordinates[at] += (gradients @ adjoint.T).float()
                    sources.add(pushes, at, gradients)
            if sources.count:
                responses = segment.propagate(responses, self.ranks.total(pushes)[:, self._columns])
                mean += self.segment_weights[number] * responses
        return self.ranks.total(coordinates), mean

    def normalize(self, vectors: Tensor) -> Tensor:
        """Scale vectors (n, own columns) to norm one in the metric 1 / D, in place; return the norms (n,), float64.

        A zero vector stays zero, with norm 0.
        """
        diagonal = self.diagonal.double()
        norms = torch.zeros(len(vectors), dtype=torch.float64)
        for lines in blocks(len(vectors), self.chunk):
            norms[lines] = (vectors[lines].double().square() / diagonal).sum(1)
        norms = self.ranks.total(norms).sqrt()
        for lines in blocks(len(vectors), self.chunk):
            vectors[lines] /= norms[lines].clamp(min=torch.finfo(vectors.dtype).tiny)[:, None].to(vectors.dtype)
        return norms

    def _title(self, name: str, number: int) -> str:
        return f"{name} {number + 1}/{len(self.segments)}"
