"""The passes over the training set that turn a recorded run into responses, probes and coordinates.

Two per segment (sampled-label gradients for curvature, row gradients), and one at the end of training for the
gradients that stand in for queries. Nothing of size rows x P is kept unless the bank is to be exact, and then it may
be on disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import QueryError, UnsupportedError
from ..gradients import RowGradients
from ..objective import Batch, Objective
from ..parameters import Parameters
from .basis import combine, factorise
from .curvature import Curvature
from .rows import Rows, uniforms
from .segment import Segment
from .storage import Storage, blocks


MAX_CURVATURE = 4096  # samples per segment unless more are asked for
_CHUNK = 256  # rows that pass through a segment together
_MAX_EXACT = 16384  # probes of an exact bank; beyond, its coordinates alone would fill the memory


@dataclass
class Responses:
    """Result of the passes.

    Attributes:
        probes (`Tensor`): (k, P).
        coordinates (`Tensor`): (rows, k), zero for rows that were never trained on.
        sources (`Tensor`): (sources, P) exact responses of whole sources, scaled to equal norm; no lines where they
            were not asked for.
        source_scales (`Tensor`): (sources,) what their scores must be multiplied with.
        kept (`float`): share of held-out score variance that the probes keep.
        exact (`bool`): whether the probes are the responses themselves.
        curvature_samples (`int`): per segment.
    """

    probes: Tensor
    coordinates: Tensor
    sources: Tensor
    source_scales: Tensor
    kept: float
    exact: bool
    curvature_samples: int


class Passes:
    """Runs the passes; use inside `at_rest(model)`.

    Args:
        model, parameters, objective: what was trained, what responds, and the likelihood.
        rows (`Rows`): the training set.
        segments (`Sequence[Segment]`): the recorded run, first to last.
        theta (`Tensor`): (P,) the responding parameters at the end.
        storage (`Storage`): where large matrices go.
        seed (`int`): of sampled labels and of sample rows.
        quiet (`bool`): no progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        objective: Objective,
        rows: Rows,
        segments: Sequence[Segment],
        theta: Tensor,
        storage: Storage,
        seed: int = 0,
        quiet: bool = False,
    ):
        self.model, self.parameters, self.rows = model, parameters, rows
        self.segments, self.theta, self.storage = list(segments), theta.cpu(), storage
        self.seed, self.quiet = seed, quiet
        self.gradients = RowGradients(model, parameters, objective)
        self.seen = torch.stack([segment.share for segment in segments]).ne(0).any(0)
        if not bool(self.seen.any()):
            raise QueryError("no row was seen in training, so nothing responds")

    def run(
        self,
        probes: int | float | str = 128,
        curvature_samples: int | None = None,
        sample_rows: int = 2048,
        groups: Tensor | None = None,
        group_count: int = 0,
    ) -> Responses:
        """Responses of the whole training set.

        Args:
            probes: k, a kept variance below 1, or `exact`.
            curvature_samples (`int`, *optional*): M per segment; one per seen row, at most 4096, by default.
            sample_rows (`int`): rows from which the basis is found.
            groups (`Tensor`, *optional*): (rows,) source of each row, -1 for none.
            group_count (`int`): sources that get an exact response.
        """
        samples = self.measure_curvature(curvature_samples)
        total = len(self.rows)
        member = torch.zeros(group_count, total)
        if group_count:
            assert groups is not None
            inside = groups >= 0
            member[groups[inside], inside.nonzero().flatten()] = 1.0
        if probes == "exact":
            return self._exact(member, samples)
        everything = total <= sample_rows
        seen = self.seen.nonzero().flatten()
        chosen = torch.arange(total)
        if not everything:
            order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(self.seed))
            chosen = seen[order[:sample_rows]].sort().values
        responses = self.respond(chosen)
        stand_ins = self.storage.zeros(len(chosen), self.parameters.size, responses.dtype)
        for at, block in self._stream(self.theta, chosen, "gradients at the end"):
            stand_ins[at] = block
        assert not isinstance(probes, str)
        basis = factorise(stand_ins, responses, self.segments[-1].diagonal, probes, self.seed)
        if everything:
            coordinates, sources = basis.coordinates, combine(member, responses)
        else:
            coordinates, sources = self._project(basis.duals, member)
        coordinates[~self.seen] = 0.0
        scales = self._normalise(sources)
        return Responses(basis.probes, coordinates.float(), sources, scales, basis.kept, False, samples)

    def measure_curvature(self, wanted: int | None = None) -> int:
        """One pass per segment: sampled-label gradients become the segment's [`Curvature`]; returns M."""
        seen = self.seen.nonzero().flatten()
        samples = min(len(seen), MAX_CURVATURE) if wanted is None else wanted
        generator = torch.Generator().manual_seed(self.seed)
        order = seen[torch.randperm(len(seen), generator=generator)]
        for number, segment in enumerate(self.segments):
            factor = self.storage.zeros(samples, self.parameters.size, self.theta.dtype)
            tokens, root = 0, segment.diagonal.sqrt()
            for start in range(0, samples, len(order)):
                rows = order[: samples - start].sort().values
                title = f"curvature {number + 1}/{len(self.segments)}"
                key = (self.seed, number, start)
                for at, block, count in self._passes(segment.theta, rows, title, key):
                    factor[start + at] = block * root
                    tokens += count
            for lines in blocks(samples, _CHUNK):
                factor[lines] /= max(tokens, 1) ** 0.5
            segment.curvature = Curvature(factor, segment.weight_decay, sampled=True)
        return samples

    def respond(self, rows: Tensor) -> Tensor:
        """Responses (len(rows), P) of the rows at these positions."""
        responses = self.storage.zeros(len(rows), self.parameters.size, self.theta.dtype)
        pushes = self.storage.zeros(len(rows), self.parameters.size, self.theta.dtype)
        for number, segment in enumerate(self.segments):
            share = segment.share[rows].to(pushes.dtype)[:, None]
            for at, block in self._stream(segment.theta, rows, f"responses {number + 1}/{len(self.segments)}"):
                pushes[at] = block * share[at]
            for lines in blocks(len(rows), _CHUNK):
                earlier = responses[lines] if number else None
                responses[lines] = segment.advance(earlier, pushes[lines])
        return responses

    def _exact(self, member: Tensor, samples: int) -> Responses:
        total, size = len(self.rows), self.parameters.size
        if min(total, size) > _MAX_EXACT:
            raise UnsupportedError(
                f"an exact bank of {total} rows and {size} responding parameters would hold {min(total, size)} "
                f"probes; at most {_MAX_EXACT} are kept: ask for a number of probes instead"
            )
        responses = self.respond(torch.arange(total))
        sources = combine(member, responses)
        scales = self._normalise(sources)
        if size < total:  # the parameters themselves are the shorter list of directions
            return Responses(torch.eye(size), responses.float(), sources, scales, 1.0, True, samples)
        norms = self._normalise(responses)
        return Responses(responses, torch.diag(norms).float(), sources, scales, 1.0, True, samples)

    def _normalise(self, vectors: Tensor) -> Tensor:
        """Scale each of (n, P), in place, to norm one in the preconditioned metric; returns the norms (n,), float64.

        A vector of zeros stays one, with norm 0.
        """
        diagonal = self.segments[-1].diagonal.double()
        norms = torch.zeros(len(vectors), dtype=torch.float64)
        for lines in blocks(len(vectors), _CHUNK):
            norms[lines] = (vectors[lines].double().square() / diagonal).sum(1).sqrt()
            vectors[lines] /= norms[lines].clamp(min=torch.finfo(vectors.dtype).tiny)[:, None].to(vectors.dtype)
        return norms

    def _project(self, duals: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (rows, k) of all rows, and sources' responses, without any (rows, P) matrix.

        The dual probes walk backwards through the segments once; then one pass per segment streams the rows.
        """
        pulls = []
        for segment in reversed(self.segments):
            pull, duals = segment.retreat(duals)
            pulls.append(pull)
        coordinates = torch.zeros(len(self.rows), len(duals), dtype=torch.float64)
        sources: Tensor | None = None
        everyone = torch.arange(len(self.rows))
        for number, (segment, pull) in enumerate(zip(self.segments, reversed(pulls), strict=True)):
            pushed = torch.zeros(member.shape[0], self.parameters.size, dtype=self.theta.dtype)
            for at, block in self._stream(segment.theta, everyone, f"coordinates {number + 1}/{len(self.segments)}"):
                share = segment.share[at].to(block.dtype)[:, None]
                coordinates[at] += (share * (block @ pull.T)).double()
                pushed += member[:, at].to(block.dtype) @ (block * share)
            if len(pushed):
                sources = segment.advance(sources, pushed)
        return coordinates, torch.zeros(0, self.parameters.size) if sources is None else sources

    def _stream(self, theta: Tensor, rows: Tensor, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(places in `rows`, gradients on the CPU) of each batch, with the responding parameters at theta."""
        for at, block, _ in self._passes(theta, rows, title, None):
            yield at, block

    def _passes(
        self, theta: Tensor, rows: Tensor, title: str, key: tuple[int, ...] | None
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        self.parameters.write(self.model, theta)
        place = torch.full((len(self.rows),), -1)
        place[rows] = torch.arange(len(rows))
        with tqdm(total=len(rows), desc=title, unit="row", disable=self.quiet, leave=False) as bar:
            for indices, batch in self.rows.batches(rows.tolist()):
                drawn = None if key is None else uniforms(indices, _positions(batch), *key)
                gradients, tokens = self.gradients(batch, None if drawn is None else drawn.to(batch["labels"].device))
                yield place[indices], gradients.to("cpu", self.theta.dtype), int(tokens.sum())
                bar.update(len(indices))


def _positions(batch: Batch) -> int:
    labels = batch["labels"]
    return int(labels[0].numel())
