"""The passes over the training set that turn a recorded run into responses, directions and coordinates.

Two per segment (sampled-label gradients for curvature, row gradients), and one at the end of training for the
gradients that stand in for queries. Nothing of size rows x P is kept unless the bank is to be exact, and then it may
be on disk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bank.codes import RowCodes
from ..errors import QueryError, UnsupportedError
from ..gradients.per_sample import PerSampleGradients
from ..models.fsdp import is_sharded
from ..models.likelihood import Batch, Objective
from ..models.parameters import Parameters
from .averaging import shares
from .curvature import Curvature
from .dataset import TrainingRows, uniforms
from .distributed import SINGLE_PROCESS, Ranks
from .low_rank import factorize
from .plan import Plan
from .responses import Responses
from .segment import Segment
from .storage import Storage, blocks


MAX_CURVATURE = 4096  # samples per segment unless more are asked for
_CHUNK = 256  # rows that pass through a segment together, if memory allows
_LEAST = 64 << 20  # bytes that the passes take in any case, however small the budget
_APART = 0x5A17 << 16  # so that no seed draws the rows that training with the same seed saw first
_MAX_EXACT = 16384  # directions of an exact bank; beyond, its coordinates alone would fill the memory


@dataclass
class Groups:
    """Sources that get an exact response: how many, and (rows,) which one each row belongs to, -1 for none."""

    count: int
    of: Tensor

    def add(self, sums: Tensor, rows: Tensor, vectors: Tensor) -> None:
        """Add (n, P) vectors of the rows at these positions (n,) to their sources' sums (count, P)."""
        if self.count:
            inside = self.of[rows] >= 0
            sums.index_add_(0, self.of[rows[inside]], vectors[inside])


class Passes:
    """Runs the passes; use inside `frozen(model)`.

    Args:
        model, parameters, objective: what was trained, what responds, and the likelihood.
        rows (`TrainingRows`): the training set.
        segments (`Sequence[Segment]`): the recorded run, first to last.
        theta (`Tensor`): (P,) the responding parameters at which queries are read; see `averaging.weights_read`.
        storage (`Storage`): where large matrices go.
        seed (`int`): of sampled labels and of sample rows.
        quiet (`bool`): no progress bars.
        smoothing (`float`): label smoothing of the training loss; outputs are always read by their likelihood.
        ranks (`Ranks`, *optional*): processes that share the work; the same arguments on each.
        announce (`Callable`, *optional*): shown the [`Plan`] before the first pass.
        averaging (`str`): after which segments the run counts as having ended; see `averaging`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        objective: Objective,
        rows: TrainingRows,
        segments: Sequence[Segment],
        theta: Tensor,
        storage: Storage,
        seed: int = 0,
        quiet: bool = False,
        smoothing: float = 0.0,
        ranks: Ranks = SINGLE_PROCESS,
        announce: Callable[[Plan], None] | None = None,
        averaging: str = "none",
    ):
        self.model, self.parameters, self.rows, self.ranks = model, parameters, rows, ranks
        self.theta, self.storage, self.seed, self.smoothing = theta.cpu(), storage, seed, smoothing
        self.quiet, self.announce = quiet or ranks.rank > 0, announce
        self.shares = shares(averaging, len(segments))
        own = ranks.columns(parameters.size)
        self.own, self.width = own, own.stop - own.start
        self.segments = [replace(segment, diagonal=segment.diagonal[own]) for segment in segments]
        self.gradients = PerSampleGradients(model, parameters, objective)
        self.seen = torch.stack([segment.share for segment in segments]).ne(0).any(0)
        if not bool(self.seen.any()):
            raise QueryError("no row was seen in training, so nothing responds")
        room = max(storage.budget, _LEAST) // (16 * self.theta.itemsize)  # a sixteenth for what is in flight
        self.chunk = max(1, min(_CHUNK, room // max(self.width, 1)))
        rows.batch_size = max(1, min(rows.batch_size, room // parameters.size))
        self._bar, self._sharded = tqdm(disable=True), is_sharded(model)

    def run(
        self,
        directions: int | float | str = 128,
        curvature_samples: int | None = None,
        sample_rows: int = 2048,
        groups: Tensor | None = None,
        group_count: int = 0,
        keep: int = 0,
    ) -> Responses:
        """Responses of the whole training set.

        Args:
            directions: k, a kept variance below 1, or `exact`.
            curvature_samples (`int`, *optional*): M per segment; one per seen row, at most 4096, by default.
            sample_rows (`int`): rows from which the basis is found.
            groups (`Tensor`, *optional*): (rows,) source of each row, -1 for none.
            group_count (`int`): sources that get an exact response.
            keep (`int`): bytes that all rows' own responses may take in 8 bits.
        """
        total, seen = len(self.rows), self.seen.nonzero().flatten()
        assert groups is not None or not group_count
        sources = Groups(group_count, torch.full((total,), -1) if groups is None else groups)
        chosen = torch.arange(total)
        if directions == "exact":
            self._check_exact()
        elif total > sample_rows:
            order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(_APART + self.seed))
            chosen = seen[order[:sample_rows]].sort().values
        samples = min(len(seen), MAX_CURVATURE) if curvature_samples is None else curvature_samples
        plan = Plan(
            max(len(seen), len(chosen)), self.parameters.size, len(self.segments), samples, len(chosen),
            directions != "exact", self.ranks.size, means=self.shares[-1] < 1,
        )  # fmt: skip
        if self.announce is not None:
            self.announce(plan)
        with tqdm(total=plan.row_passes, unit="row", disable=self.quiet, leave=False) as self._bar:
            self.measure_curvature(samples)
            if directions == "exact":
                return self._exact(sources, samples)
            assert not isinstance(directions, str)
            return self._factorised(directions, chosen, sources, samples, keep)

    def measure_curvature(self, samples: int) -> None:
        """One pass per segment: M sampled-label gradients become the segment's [`Curvature`]."""
        seen = self.seen.nonzero().flatten()
        generator = torch.Generator().manual_seed(_APART + self.seed)
        order = seen[torch.randperm(len(seen), generator=generator)]
        for number, segment in enumerate(self.segments):
            factor = self.storage.zeros(samples, self.width, self.theta.dtype)
            tokens, root = torch.zeros(1, dtype=torch.int64), segment.diagonal.sqrt()
            for start in range(0, samples, len(order)):
                rows = order[: samples - start].sort().values
                title = f"curvature {number + 1}/{len(self.segments)}"
                key = (self.seed, number, start)
                for at, block, count in self._shared(segment.theta, rows, title, key):
                    factor[start + at] = block * root
                    tokens += count
            self.ranks.total(tokens)
            for lines in blocks(samples, self.chunk):
                factor[lines] /= max(int(tokens), 1) ** 0.5
            segment.curvature = Curvature(factor, segment.weight_decay, sampled=True, ranks=self.ranks)

    def respond(self, rows: Tensor, pushes: Tensor) -> Tensor:
        """Responses (len(rows), own columns) of the rows at these positions; `pushes` is room of that shape."""
        responses = self.storage.zeros(len(rows), self.width, self.theta.dtype)
        one_end = self.shares[-1] == 1.0
        mean = responses if one_end else self.storage.zeros(len(rows), self.width, self.theta.dtype)
        for number, segment in enumerate(self.segments):
            share = segment.share[rows].to(pushes.dtype)[:, None]
            title = f"responses {number + 1}/{len(self.segments)}"
            for at, block, _ in self._shared(segment.theta, rows, title, smoothing=self.smoothing):
                pushes[at] = block * share[at]
            for lines in blocks(len(rows), self.chunk):
                earlier = responses[lines] if number else None
                responses[lines] = segment.propagate(earlier, pushes[lines])
                if not one_end:
                    mean[lines] += self.shares[number] * responses[lines]
        return mean

    def _factorised(
        self, directions: int | float, chosen: Tensor, groups: Groups, samples: int, keep: int
    ) -> Responses:
        room = self.storage.zeros(len(chosen), self.width, self.theta.dtype)
        responses = self.respond(chosen, room)
        for at, block, _ in self._shared(self.theta, chosen, "gradients at the end"):
            room[at] = block
        basis = factorize(room, responses, self.segments[-1].diagonal, directions, self.seed, self.ranks)
        sources = torch.zeros(groups.count, self.width, dtype=self.theta.dtype)
        for lines in blocks(len(chosen), self.chunk):
            groups.add(sources, chosen[lines], responses[lines])
        coordinates = basis.coordinates.float()
        rest = self.seen.clone()
        rest[chosen] = False
        if len(chosen) < len(self.rows):
            coordinates, moved = self._project(basis.adjoint_basis, rest.nonzero().flatten(), groups)
            coordinates[chosen] = basis.coordinates.float()
            sources += moved
        coordinates[~self.seen] = 0.0
        small = len(self.rows) * self.parameters.size <= keep
        own = self._quantised(responses) if small and len(chosen) == len(self.rows) else None
        scales = self._normalise(sources)
        return Responses(
            self._whole(basis.directions), coordinates, self._whole(sources), scales, basis.kept, False, samples, own,
            None if own is None else -basis.scores,
        )  # fmt: skip

    def _quantised(self, responses: Tensor) -> RowCodes | None:
        """Responses (rows, own columns) of all rows in 8 bits, on rank 0; None on other ranks."""
        parts = []
        for lines in blocks(len(responses), self.chunk):
            whole = self._whole(responses[lines])
            if self.ranks.rank == 0:
                parts.append(RowCodes.of(whole))
        if not parts:
            return None
        return RowCodes(torch.cat([part.values for part in parts]), torch.cat([part.steps for part in parts]))

    def _check_exact(self) -> None:
        total, size = len(self.rows), self.parameters.size
        if min(total, size) > _MAX_EXACT:
            raise UnsupportedError(
                f"an exact bank of {total} rows and {size} responding parameters would hold {min(total, size)} "
                f"directions; at most {_MAX_EXACT} are kept: ask for a number of directions instead"
            )

    def _exact(self, groups: Groups, samples: int) -> Responses:
        total, size = len(self.rows), self.parameters.size
        everyone = torch.arange(total)
        responses = self.respond(everyone, self.storage.zeros(total, self.width, self.theta.dtype))
        sources = torch.zeros(groups.count, self.width, dtype=self.theta.dtype)
        for lines in blocks(total, self.chunk):
            groups.add(sources, everyone[lines], responses[lines])
        scales = self._normalise(sources)
        sources = self._whole(sources)
        if size < total:  # the parameters themselves are the shorter list of directions
            return Responses(torch.eye(size), self._whole(responses).float(), sources, scales, 1.0, True, samples)
        norms = self._normalise(responses)
        return Responses(self._whole(responses), torch.diag(norms).float(), sources, scales, 1.0, True, samples)

    def _whole(self, part: Tensor) -> Tensor:
        return self.ranks.whole(part, self.parameters.size)

    def _normalise(self, vectors: Tensor) -> Tensor:
        """Scale each of (n, own columns), in place, to norm one in the preconditioned metric; the norms (n,), float64.

        A vector of zeros stays one, with norm 0.
        """
        diagonal = self.segments[-1].diagonal.double()
        norms = torch.zeros(len(vectors), dtype=torch.float64)
        for lines in blocks(len(vectors), self.chunk):
            norms[lines] = (vectors[lines].double().square() / diagonal).sum(1)
        norms = self.ranks.total(norms).sqrt()
        for lines in blocks(len(vectors), self.chunk):
            vectors[lines] /= norms[lines].clamp(min=torch.finfo(vectors.dtype).tiny)[:, None].to(vectors.dtype)
        return norms

    def _project(self, adjoint_basis: Tensor, rows: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """Coordinates (all rows, k) of the rows at these positions, and sources' sums of their responses.

        No (rows, P) matrix is made: the dual directions walk backwards through the segments once; then one pass per
        segment streams the rows, each rank its own ones with all columns.
        """
        pulls, hidden_state_gradients = [], torch.zeros((), dtype=adjoint_basis.dtype)
        for segment, share in zip(reversed(self.segments), reversed(self.shares), strict=True):
            pull, hidden_state_gradients = segment.adjoint(hidden_state_gradients + share * adjoint_basis)
            pulls.append(pull)
        coordinates = self.storage.zeros(len(self.rows), len(adjoint_basis))
        sources = torch.zeros(groups.count, self.width, dtype=self.theta.dtype)
        mean = torch.zeros_like(sources)
        for number, (segment, own) in enumerate(zip(self.segments, reversed(pulls), strict=True)):
            pull = self.ranks.spread(own, self.parameters.size)
            pushed = torch.zeros(groups.count, self.parameters.size, dtype=self.theta.dtype)
            title = f"coordinates {number + 1}/{len(self.segments)}"
            with self.ranks.raise_on_all_ranks():
                for indices, block, _ in self._passes(segment.theta, rows, title, None, self.smoothing):
                    block *= segment.share[indices].to(block.dtype)[:, None]
                    coordinates[indices] += (block @ pull.T).float()
                    groups.add(pushed, indices, block)
            if groups.count:
                sources = segment.propagate(sources, self.ranks.total(pushed)[:, self.own])
                mean += self.shares[number] * sources
        return self.ranks.total(coordinates), mean

    def _shared(
        self, theta: Tensor, rows: Tensor, title: str, key: tuple[int, ...] | None = None, smoothing: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(places in `rows`, gradients of this rank's columns, this rank's supervised positions) until all came."""
        place = torch.full((len(self.rows),), -1)
        place[rows] = torch.arange(len(rows))
        mine = self._passes(theta, rows, title, key, smoothing)
        empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.parameters.size, dtype=self.theta.dtype), 0
        for _ in range(self._rounds(rows)):
            try:
                indices, block, tokens = next(mine, empty)
            except Exception:
                if self.ranks.size > 1:  # the others must not wait for this rank
                    self.ranks.fail(self.rows.batch_size)
                raise
            places, columns = self.ranks.exchange(place[indices], block, self.rows.batch_size)
            yield places, columns, tokens

    def _passes(
        self, theta: Tensor, rows: Tensor, title: str, key: tuple[int, ...] | None, smoothing: float
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(positions of rows, gradients on the CPU, supervised positions) of each batch of this rank's rows among
        these, with theta in the model.
        """
        self.parameters.write(self.model, theta)
        self._bar.set_description(title)
        for indices, batch in self._batches(rows):
            drawn = uniforms(indices, _positions(batch), *key) if key is not None and len(indices) else None
            gradients, tokens = self.gradients(
                batch, None if drawn is None else drawn.to(batch["labels"].device), smoothing
            )
            self._bar.update(len(indices) * self.ranks.size)
            count = len(indices)
            yield indices, gradients[:count].to("cpu", self.theta.dtype), int(tokens[:count].sum())

    def _rounds(self, rows: Tensor) -> int:
        """Batches of the rank with the most of these rows."""
        return self.rows.count(-(-len(rows) // self.ranks.size))

    def _batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Batch]]:
        """This rank's batches. Of a sharded model all ranks have as many, because they run it together: a rank whose
        rows have come to their end goes on with one that does not count. What cannot be read fails everywhere, before
        anybody waits in the model.
        """
        batches = self.rows.batches(rows[self.ranks.rank :: self.ranks.size].tolist())
        if not self._sharded:
            yield from batches
            return
        spare: tuple[Tensor, Batch] | None = None
        for _ in range(self._rounds(rows)):
            with self.ranks.raise_on_all_ranks():
                found = next(batches, None) or spare
                if found is None:
                    found = torch.zeros(0, dtype=torch.int64), self.rows.batch([int(rows[0])])
            yield found
            one = {key: value[:1] if isinstance(value, Tensor) else value for key, value in found[1].items()}
            spare = found[0][:0], one


def _positions(batch: Batch) -> int:
    labels = batch["labels"]
    return int(labels[0].numel())
