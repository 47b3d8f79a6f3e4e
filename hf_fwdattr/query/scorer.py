"""Queries read with a bank: along all of its directions, or in two stages within a budget of forward passes.

In two stages, one plain forward predicts the query's gradient (`synthetic`), whose products with the rows' own
responses are a first look at every row. A few directions, read exactly, correct it where the prediction errs most for most
queries; then the rows that matter are read exactly, each along its own response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bank.bank import ResponseBank
from ..errors import QueryError
from ..gradients.predictor import GradientPredictor
from ..jvp.backend import Backend
from ..models.likelihood import CAUSAL_LM
from ..models.parameters import Parameters
from .gaussian_process import GaussianProcess
from .inputs import Query, check, padded
from .ranking import RankedRows, rank, scores, source_coordinates
from .row_codes import BankResponses
from .shortlist import MOST, search


Along = Callable[[Tensor], Tensor]  # directions (n, P) -> (queries, positions, n)
Budget = int | str  # forward passes, or `ADAPTIVE`
ADAPTIVE = "adaptive"
BUDGET = 128  # forward passes for naming rows, where the bank allows two stages: measured by scripts/readout_curve.py
_SOON = 3.0  # seconds after which a query shows how far it is
_SHARE = 4  # one in so many forward passes is read along sums of responses (or a direction), the others along rows
_SUMS = 16  # passes along sums where the number of passes is left open


@dataclass
class Attribution:
    """What is behind one query.

    Attributes:
        sides (`tuple[RankedRows, ...]`): proponents and opponents; empty where no rows are wanted.
        sources (`Tensor`): (sources,) nats, float64.
    """

    sides: tuple[RankedRows, ...]
    sources: Tensor


class Scorer:
    """Reads token lists with a bank.

    Args:
        bank (`ResponseBank`): what is read along.
        model (`nn.Module`): the model that the bank belongs to, in evaluation mode.
        parameters (`Parameters`): what responds in it.
        engine (`Backend`, *optional*): what reads.
        quiet (`bool`, defaults to `True`): no progress bar over queries that take more than a few seconds.
    """

    def __init__(
        self,
        bank: ResponseBank,
        model: nn.Module,
        parameters: Parameters,
        engine: Backend | None = None,
        quiet: bool = True,
    ):
        self.quiet = quiet
        self.bank, self.model, self.parameters = bank, model, parameters
        self.engine = engine or Backend(model, parameters)
        self._own = BankResponses(bank) if bank.manifest.row_codes else None
        self._held: tuple[int, Tensor] | None = None

    @property
    def _device(self) -> torch.device:
        return self.parameters.tensors(self.model)[0].device

    @cached_property
    def _first_look(self) -> GradientPredictor | None:
        """Predicts gradients; None where the bank keeps no maps."""
        if not self.bank.manifest.error_projections:
            return None
        maps = {name: table.to(self._device) for name, table in self.bank.error_projections().items()}
        return GradientPredictor(self.model, self.parameters, CAUSAL_LM, maps)

    def budget(self, asked: Budget | None) -> Budget | None:
        """Forward passes for naming rows, or `ADAPTIVE`; None: all of the bank's directions.

        Raises:
            QueryError: fewer were asked for than the bank's directions, and it keeps no maps; certainty, and it does not
                keep how errors of first looks go together.
        """
        gradient_predictor = bool(self.bank.manifest.error_projections)
        if asked is None:
            return BUDGET if gradient_predictor and self.bank.manifest.directions >= BUDGET else None
        if isinstance(asked, str):
            if not self.bank.manifest.error_covariance:
                raise QueryError(
                    f"budget={asked!r}: the bank does not keep what certainty takes (its rows' own responses, and how "
                    "errors of first looks go together); give a number of forward passes"
                )
            return asked
        if asked < 1:
            raise QueryError(f"budget={asked}: a query takes at least one forward pass")
        if not gradient_predictor and asked < self.bank.manifest.directions + 1:
            raise QueryError(
                f"budget={asked}: the bank keeps nothing that a first look could use, so a query takes a forward pass "
                f"for each of its {self.bank.manifest.directions} directions; leave budget out"
            )
        return asked if gradient_predictor else None

    def along(self, queries: Sequence[Query], directions: Tensor) -> Tensor:
        """(queries, positions, n): derivatives of each token's log-likelihood along (n, P)."""
        return self._opened(queries, False)(directions)

    def _opened(self, queries: Sequence[Query], staged: bool) -> Along:
        """What reads these queries along directions, as often as it is asked; for one call, as weights may change."""
        batch = self.batch(queries)
        with self.bank.query_weights(self.model, self.parameters):
            read = self.engine.opened(batch, staged)

        def along(directions: Tensor) -> Tensor:
            with self.bank.query_weights(self.model, self.parameters):
                return read(directions)

        return along

    def directions(self, queries: Sequence[Query], lines: slice) -> Tensor:
        """(queries, positions, lines): the readout along some of the bank's directions, the rows' before the sources'."""
        return self.along(queries, self._lines(lines))

    def summed(self, queries: Sequence[Query], lines: slice, batch_size: int | None) -> Tensor:
        """(queries, lines): readouts summed over output tokens, float64, on the CPU."""
        step = batch_size or (8 if self._device.type == "cuda" else 1)
        parts = [
            self.directions(queries[at : at + step], lines).double().sum(1) for at in range(0, len(queries), step)
        ]
        return torch.cat(parts).cpu()

    def scores(self, queries: Sequence[Query], batch_size: int | None = None, budget: int | None = None) -> Tensor:
        """(queries, rows) in nats, float32, on the CPU: from all directions, or from `budget` forward passes."""
        if budget is None:
            readout = self.summed(queries, slice(0, self.bank.manifest.directions), batch_size)
            return scores(readout[:, None], self.bank.coordinates(checked=False))
        if self.bank.manifest.exact and budget > 1:
            return torch.stack([self.rank(query, 1, budget)[1] for query in queries]).float()
        step = batch_size or 8
        learns = self._own is not None and self._own.kernel is not None  # along as many sums as there are rows
        spent = budget - 1 if learns else self._probes_within(budget - 1)
        parts = [self._estimate(queries[at : at + step], spent) for at in range(0, len(queries), step)]
        return torch.cat(parts).float()

    def per_source(self, summed: Tensor) -> Tensor:
        """(queries, sources) from readouts summed over tokens.

        Exact where sources have directions, whose readout `summed` then is; else from the sum of their rows' coordinates.
        """
        manifest = self.bank.manifest
        if manifest.source_directions:
            return summed * torch.tensor(manifest.source_scales, dtype=torch.float64)
        return summed @ source_coordinates(self.bank.coordinates(), len(manifest.sources)).T

    def attribute(self, queries: Sequence[Query], count: int, budget: Budget | None) -> list["Attribution"]:
        """Rows on either side, and all sources, of each query; with `count` 0 only what sources need is read."""
        if budget is not None and count:
            return [self._in_stages(query, count, budget) for query in queries]
        return [self.attributed(readout, count) for readout in self.directions(queries, self.lines(count))]

    def lines(self, count: int) -> slice:
        """The directions that naming so many rows on either side takes; with 0, those that sources take."""
        return slice(0 if count or not self.bank.manifest.source_directions else self.bank.manifest.directions, None)

    def attributed(self, readout: Tensor, count: int) -> "Attribution":
        """From a readout (positions, lines) of one query along `lines(count)`."""
        manifest = self.bank.manifest
        sides = (
            rank(readout[None, :, : manifest.directions], self.bank.coordinates(checked=False), count)[0]
            if count
            else ()
        )
        summed = readout.double().sum(0, keepdim=True).cpu()
        return Attribution(sides, self.per_source(summed[:, -manifest.source_directions :])[0])

    def _in_stages(self, query: Query, count: int, budget: Budget) -> "Attribution":
        manifest = self.bank.manifest
        sides, estimate = self.rank(query, count, budget)
        if manifest.source_directions:
            own = slice(manifest.directions, None)
            return Attribution(sides, self.per_source(self.summed([query], own, 1))[0])
        values = torch.zeros(len(manifest.sources), dtype=torch.float64)
        _, sources = self._named
        known = sources >= 0
        return Attribution(sides, values.index_add_(0, sources[known].long(), estimate[known]))

    def rank(self, query: Query, count: int, budget: Budget) -> tuple[tuple[RankedRows, RankedRows], Tensor]:
        """Proponents and opponents of one query in two stages, and estimates (rows,) of all scores, float64.

        The scores of the rows named are exact up to the eighth bit of their responses; where the bank has no responses
        of rows, they are what its directions keep. At least `count` rows on either side are read, whatever the budget.

        With `ADAPTIVE` rows are read until no other is likely to belong to them; see `search`.
        """
        rows = None if isinstance(budget, str) else budget - 1
        learned, along = None, self._opened([query], True)
        if self._own is not None and self._own.kernel is not None:
            spent = _SUMS if rows is None else rows // _SHARE
            learned = self._learned(along, self._first([query])[0], spent)
            estimate = learned.expected()
        else:
            assert rows is not None
            spent = self._probes_within(rows // _SHARE)
            estimate = self._estimate([query], spent)[0]
        most = MOST if rows is None else rows - spent
        with tqdm(total=max(most, 2 * count), unit="pass", delay=_SOON, disable=self.quiet, leave=False) as bar:

            def read(places: Tensor) -> Tensor:
                tokens = along(self._responses_of(places).to(self._device))[0].double().cpu()
                bar.update(len(places))
                return tokens

            found = search(estimate, learned, count, None if rows is None else most, read)
        ids, sources = self._named
        scores = found.tokens.sum(0).float()
        named = RankedRows(found.places, ids[found.places], sources[found.places], scores, found.tokens.T.float())
        return (_sorted(named, count, 1.0), _sorted(named, count, -1.0)), found.estimate

    def _probes_within(self, passes: int) -> int:
        """Directions to read in so many forward passes: none of an exact bank, whose directions are its rows, in no order."""
        return 0 if self.bank.manifest.exact else min(passes, self.bank.manifest.directions)

    def _gradients(self, queries: Sequence[Query]) -> Tensor:
        """(queries, P), on the CPU: predicted from one forward pass."""
        batch = self.batch(queries)
        with self.bank.query_weights(self.model, self.parameters):
            assert self._first_look is not None
            return self._first_look(batch).cpu()

    def _first(self, queries: Sequence[Query]) -> Tensor:
        """(queries, rows), float64: the first look along rows' own responses."""
        assert self._own is not None
        return self._own.products(self._gradients(queries))

    def _learned(self, along: Along, first: Tensor, spent: int) -> GaussianProcess:
        """What is known of a query after its first look (rows,) and so many passes along sums of responses."""
        assert self._own is not None
        assert self._own.kernel is not None
        learned = GaussianProcess(first, self._own.kernel)
        if spent:
            weights, directions = self._own.sums(spent)
            found = along(directions.to(self._device))[0].double().sum(0).cpu()
            learned.mixtures(weights, found - weights.T @ first)
        return learned

    def _estimate(self, queries: Sequence[Query], spent: int) -> Tensor:
        """(queries, rows), float64: the first look, corrected in `spent` passes."""
        if self._own is not None and self._own.kernel is not None:
            first = self._first(queries)
            if not spent:
                return first
            looks = zip(queries, first, strict=True)
            return torch.stack(
                [self._learned(self._opened([query], True), look, spent).expected() for query, look in looks]
            )
        gradients = self._gradients(queries)
        head = self._lines(slice(0, spent if self._own is not None else self.bank.manifest.directions)).cpu()
        predicted = (gradients @ head.T).double()
        exact = self.directions(queries, slice(0, spent)).double().sum(1).cpu() if spent else predicted[:, :0]
        change = exact - predicted[:, :spent]
        if self._own is not None:
            first = self._own.products(gradients)
        else:
            first = torch.zeros(len(queries), len(self.bank)).double()
            change = torch.cat([exact, predicted[:, spent:]], 1)
        if not change.shape[1]:
            return first
        blocks = [block[:, : change.shape[1]].double() for _, _, block in self.bank.coordinates()]
        return first + torch.cat([change @ block.T for block in blocks], dim=1)

    def _responses_of(self, places: Tensor) -> Tensor:
        """(n, P): rows' own responses, or what the directions keep of them."""
        if self._own is not None:
            return self._own.of(places)
        found, at = [], 0
        for _, _, block in self.bank.coordinates():
            here = places[(places >= at) & (places < at + len(block))]
            found.append(block[here - at])
            at += len(block)
        return torch.cat(found) @ self._lines(slice(0, self.bank.manifest.directions)).cpu()

    @cached_property
    def _named(self) -> tuple[Tensor, Tensor]:
        """Ids and sources (rows,): twelve bytes a row, kept between queries."""
        parts = [(ids.clone(), sources.clone()) for ids, sources, _ in self.bank.coordinates(checked=False)]
        return torch.cat([ids for ids, _ in parts]), torch.cat([sources for _, sources in parts])

    def _lines(self, lines: slice) -> Tensor:
        """(lines, P) on the model's device, read from the bank when they are first asked for, and kept."""
        manifest = self.bank.manifest
        start, end, _ = lines.indices(manifest.directions + manifest.source_directions)
        first, held = self._held or (start, None)
        if held is None or not first <= start <= end <= first + len(held):
            last = end if held is None else max(end, first + len(held))
            first = min(start, first)
            held = self.bank.directions(lines=slice(first, last)).to(self._device)
            self._held = first, held
        return held[start - first : end - first]

    def batch(self, queries: Sequence[Query]) -> dict[str, Tensor]:
        """Token lists as a batch on the model's device, right-padded together.

        Raises:
            QueryError: no supervised token, labels that do not fit, or too long for the model.
        """
        self.check(queries)
        return padded(queries, self._device)

    def check(self, queries: Sequence[Query]) -> None:
        """Refuse queries that cannot be scored, before anything is computed."""
        check(queries, self.model.config)


def _sorted(rows: RankedRows, count: int, sign: float) -> RankedRows:
    """The rows whose scores have this sign, largest magnitude first, at most `count`."""
    order = torch.argsort(sign * rows.scores, descending=True, stable=True)[:count]
    order = order[sign * rows.scores[order] > 0]
    return RankedRows(
        rows.positions[order], rows.ids[order], rows.sources[order], rows.scores[order], rows.token_scores[order]
    )
