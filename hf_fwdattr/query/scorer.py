"""Scorer of tokenized queries: the public door to everything that a bank knows of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bank.bank import ResponseBank
from ..errors import QueryError
from ..jvp.backend import Backend
from .backward_scorer import BackwardScorer
from .budget import Budget, ResolvedBudget, resolve_budget
from .derivatives import QueryDerivatives
from .direction_scorer import DirectionScorer
from .inputs import Query, check_batch_size, check_top_k
from .locking import one_at_a_time
from .results import Attribution, Ranking
from .two_stage import TwoStageScorer


__all__ = ["Scorer"]


class Scorer:
    """Scores tokenized queries with a bank.

    The attribution pipeline tokenizes, generates and formats; the scores are computed here.

    ```python
    bank = ResponseBank.from_pretrained("path/of/the/adapter")
    scorer = Scorer(bank, model.eval())
    query = {"input_ids": [464, 3139, 286], "labels": [-100, -100, 286]}  # -100 where a token is not of the output
    scorer.scores([query])  # (queries, rows) in nats
    ranking = scorer.rank(query, top_k=10, budget=97)  # ten rows on either side, exact, in about 97 forward passes
    ranking.proponents.row_indices, ranking.proponents.scores, ranking.passes
    ```

    Threads may share a scorer, and a model with its scorers and pipelines: queries are scored one at a time. Padding
    in a query's tokens is left out where its `attention_mask` is 0.

    What a query is scored with depends on the budget, an `int`, `"adaptive"`, `"all"`, or None for the bank's default
    (see `resolve_budget`): `DirectionScorer` reads all of the bank's directions, and `TwoStageScorer` corrects the
    coarse scores of a gradient predictor.

    Args:
        bank (`ResponseBank`): the bank.
        model (`nn.Module`): the model that it belongs to, in evaluation mode.
        readout (`str`, defaults to `auto`): `auto`, `jvp` or `difference`; see `Backend`. Or `backward`: one backward
            pass per query instead of forward passes (budgets do not matter then), for comparison.
        precision (`str`, defaults to `auto`): `auto`, `full` or `half`; see `Backend`.
        allow_mismatch (`Sequence[str]`): with "weights", other weights than the bank's are accepted.
        progress (`bool`, defaults to `False`): show a bar over queries that take more than a few seconds.

    Raises:
        MismatchError: the bank belongs to another model.
    """

    def __init__(
        self, bank: ResponseBank, model: nn.Module, readout: str = "auto", precision: str = "auto",
        allow_mismatch: Sequence[str] = (), progress: bool = False,
    ):  # fmt: skip
        self.bank, self.model = bank, model
        self.parameters = bank.check_model(model, allow_mismatch)
        backend = Backend(model, self.parameters, "auto" if readout == "backward" else readout, precision)
        self._derivatives = QueryDerivatives(bank, model, self.parameters, backend, allow_mismatch)
        self._directions = DirectionScorer(self._derivatives)
        self._two_stage = TwoStageScorer(self._derivatives, self._directions, progress)
        self._backward = BackwardScorer(self._derivatives) if readout == "backward" else None

    def resolve_budget(self, budget: Budget) -> ResolvedBudget:
        """Check a budget against the bank, and replace None by the bank's default; see `budget.resolve_budget`."""
        return resolve_budget(self.bank.manifest, budget)

    @one_at_a_time
    @torch.no_grad()
    def attribute(self, queries: Sequence[Query], top_k: int = 5, budget: Budget = None) -> list[Attribution]:
        """Name rows on either side of each query, and score all sources.

        Args:
            top_k (`int`): rows on either side; with 0, or a bank of sources only, just what sources need is read.
            budget (`Budget`, *optional*): forward passes for naming rows; sources with directions take one each.

        Raises:
            QueryError: a query that cannot be scored, or a budget that the bank cannot serve.
        """
        resolved, top_k = self.resolve_budget(budget), check_top_k(top_k)
        if self.bank.manifest.privacy.rows == "sources":
            top_k = 0
        if self._backward is not None:
            return [self._backward.attribute(query, top_k) for query in queries]
        if resolved == "all" or not top_k:
            return self._directions.attribute(queries, top_k)
        return [self._two_stage.attribute(query, top_k, resolved) for query in queries]

    @one_at_a_time
    @torch.no_grad()
    def rank(self, query: Query, top_k: int = 5, budget: Budget = None) -> Ranking:
        """Name rows on either side of one query, and score all rows; sources are left out.

        Raises:
            QueryError: a query that cannot be scored, or a budget that the bank cannot serve.
        """
        self._check_rows()
        resolved, top_k = self.resolve_budget(budget), check_top_k(top_k)
        if self._backward is not None:
            return self._backward.rank(query, top_k)
        if resolved == "all":
            return self._directions.rank(query, top_k)
        return self._two_stage.rank(query, top_k, resolved)

    @one_at_a_time
    @torch.no_grad()
    def scores(self, queries: Sequence[Query], batch_size: int | None = None, budget: Budget = "all") -> Tensor:
        """Return the scores of all rows: (queries, rows) in nats, float32, on the CPU.

        Args:
            batch_size (`int`, *optional*): queries that are read together; by default 8 on a GPU, and one at a time on
                a CPU, where the tangents of several leave its caches.
            budget (`Budget`): all of the bank's directions by default. With a number of forward passes, the first
                gives coarse scores and the others correct them along directions; no row is read.

        Raises:
            QueryError: a query that cannot be scored, or a budget that the bank cannot serve.
        """
        self._check_rows()
        self._derivatives.batch(queries)  # checked before any is scored
        resolved = self.resolve_budget(budget)
        if resolved == "adaptive":
            raise QueryError("budget='adaptive': it chooses rows to name, and here all are scored. Give a number")
        if self._backward is not None:
            return self._backward.scores(queries).float()
        if resolved == "all":
            return self._directions.scores(queries, check_batch_size(batch_size))
        return self._two_stage.scores(queries, resolved, check_batch_size(batch_size))

    @one_at_a_time
    @torch.no_grad()
    def source_scores(self, queries: Sequence[Query], batch_size: int | None = None) -> Tensor:
        """Return the scores of all sources, in the order of `bank.manifest.sources`: (queries, sources), float32, CPU.

        Only the sources' own directions are read, where the bank has them.
        """
        self._derivatives.batch(queries)  # checked before any is scored
        if self._backward is not None:
            return self._backward.source_scores(queries).float()
        return self._directions.source_scores(queries, check_batch_size(batch_size)).float()

    @one_at_a_time
    @torch.no_grad()
    def row_scores(self, query: Query, row_indices: Sequence[int]) -> Tensor:
        """Return exact scores of chosen rows, in this order: (n,) nats, float64; a forward pass for each.

        They are exact up to the rows' codes or, without row codes, up to what the bank's directions keep.
        """
        self._check_rows()
        order, inverse = torch.tensor(list(row_indices), dtype=torch.int64).unique(return_inverse=True)
        return self._two_stage.row_scores(query, order)[inverse]

    @one_at_a_time
    @torch.no_grad()
    def directional_derivatives(self, queries: Sequence[Query], directions: Tensor | slice = slice(None)) -> Tensor:
        """Differentiate each token's log-likelihood: (queries, positions, k) in nats, zero where it is no output.

        Position p belongs to token p + 1 of a query, not counting padding.

        Args:
            directions (`Tensor` or `slice`): directions (k, P), or indices of the bank's own: all by default, the
                rows' before the sources'.
        """
        if isinstance(directions, slice):
            return self._derivatives.along(queries, directions)
        return self._derivatives.prepare(queries).jvp(directions)

    @one_at_a_time
    @torch.no_grad()
    def predicted_gradients(self, queries: Sequence[Query]) -> Tensor:
        """Return the gradient predictor's gradients of the log-likelihoods: (queries, P), float32, on the CPU.

        Raises:
            QueryError: the bank holds no gradient predictor.
        """
        if not self.bank.manifest.error_projections:
            raise QueryError("the bank holds no gradient predictor; build it with gradient_predictor=True")
        return self._two_stage.predicted_gradients(queries)

    def batch(self, queries: Sequence[Query]) -> dict[str, Tensor]:
        """Return queries as one batch on the model's device, checked and padded on the right."""
        return self._derivatives.batch(queries)

    def _check_rows(self) -> None:
        if self.bank.manifest.privacy.rows == "sources":
            raise QueryError("the bank keeps sources only and has no rows to score; use source_scores")
