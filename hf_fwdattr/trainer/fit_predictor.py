"""The fit of the gradient predictor: error projections, their explained variance, and the covariance of errors."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UnsupportedError
from ..gradients.per_sample import PerSampleGradients
from ..gradients.predictor import GradientPredictor
from ..models.fsdp import is_sharded
from ..models.likelihood import Batch
from ..query.gaussian_process import error_covariance
from ..response.dataset import TrainingRows
from ..response.responses import Responses
from .build_context import BuildContext


__all__ = ["PREDICTOR_MISSING", "FittedPredictor", "fit_predictor", "missing_predictor", "predictor_cost"]

_FIT_ROWS = 512  # rows to fit on, at most: some dozens of tokens a row against d^2 numbers a projection
_HELD_OUT_ROWS = 32  # rows to judge the fit on, at most
_CHUNK = 128  # predicted gradients that are multiplied with the responses together
PREDICTOR_MISSING = "Without one rows are not scored in two stages: a query takes a forward pass for each direction"
logger = logging.getLogger(__name__)


@dataclass
class FittedPredictor:
    """A gradient predictor as a bank keeps it.

    Attributes:
        error_projections (`dict[str, Tensor]`): by canonical path of the layer; see `gradients.predictor`.
        explained_variance (`float`): share of the score variance of held-out rows that it explains, 1 at best; may be
            negative.
        error_covariance (`Tensor`, *optional*): (rows, rows) covariance of its errors; see `query.gaussian_process`.
    """

    error_projections: dict[str, Tensor]
    explained_variance: float
    error_covariance: Tensor | None


def missing_predictor(context: BuildContext) -> str:
    """Return why a model or its memory supports no gradient predictor; empty if they do."""
    try:
        _unfitted(context)
    except UnsupportedError as error:
        return str(error).rstrip(".")
    return ""


def predictor_cost(context: BuildContext, all_rows: bool) -> tuple[int, int]:
    """Return the rows that `fit_predictor` will read, and the bytes that the fit takes; zeros if it is not supported.

    Args:
        context (`BuildContext`): what the bank is built from.
        all_rows (`bool`): whether scores of all rows will be known, so that all are predicted.
    """
    try:
        predictor = _unfitted(context)
    except UnsupportedError:
        return 0, 0
    total = len(context.rows)
    fit_rows, held_out = _split(total)
    return len(fit_rows) + (total if all_rows else 2 * len(held_out)), predictor.fitting_bytes


def fit_predictor(context: BuildContext, responses: Responses) -> FittedPredictor | str:
    """Fit a gradient predictor at the model's weights and judge it; return why there is none if that is impossible.

    A few hundred rows are read; all rows where `responses` has their scores, for the covariance of errors.
    """
    rows, quiet, scores = context.rows, context.config.quiet, responses.sample_scores
    fit_rows, held_out = _split(len(rows))
    try:
        predictor = _unfitted(context)
        with tqdm(total=len(fit_rows), desc="gradient predictor", unit="row", disable=quiet, leave=False) as bar:
            projections = predictor.fit(_counted(rows, fit_rows, bar))
        if scores is None:
            covariance, exact = None, _exact_scores(context, responses, held_out)
            predicted = _coarse_scores(predictor, rows, held_out, responses, quiet=True)
        else:
            predicted = _coarse_scores(predictor, rows, list(range(len(rows))), responses, quiet)
            covariance, exact, predicted = error_covariance(scores - predicted), scores[held_out], predicted[held_out]
    except UnsupportedError as error:  # the responses, which took longer, are not lost with it
        logger.warning("the bank has no gradient predictor: %s. %s", str(error).rstrip("."), PREDICTOR_MISSING)
        return str(error)
    unexplained = float((exact - predicted).square().sum() / exact.square().sum().clamp(min=1e-30))
    return FittedPredictor(projections, 1.0 - unexplained, covariance)


def _exact_scores(context: BuildContext, responses: Responses, row_indices: list[int]) -> Tensor:
    """Return the scores (n, rows) of these ascending rows as queries, from their own gradients."""
    gradients = PerSampleGradients(context.model, context.parameters, context.objective)
    scores, order = [], []
    for indices, batch in context.rows.batches(row_indices):
        scores.append(responses.products(-gradients(batch)[0].cpu()))
        order.append(indices)
    return torch.cat(scores)[torch.cat(order).argsort()]


def _coarse_scores(
    predictor: GradientPredictor, rows: TrainingRows, row_indices: list[int], responses: Responses, quiet: bool
) -> Tensor:
    """Return the scores (n, rows) of these ascending rows as queries, from their predicted gradients."""
    scores: list[Tensor] = []
    waiting: list[Tensor] = []
    order: list[Tensor] = []
    batches, total = rows.batches(row_indices), rows.count(len(row_indices))
    for indices, batch in tqdm(batches, "coarse scores", total, unit="batch", disable=quiet, leave=False):
        order.append(indices)
        waiting.append(predictor(batch).cpu())
        if sum(map(len, waiting)) >= _CHUNK:
            scores.append(responses.products(torch.cat(waiting)))
            waiting = []
    scores += [responses.products(torch.cat(waiting))] if waiting else []
    return torch.cat(scores)[torch.cat(order).argsort()]


def _unfitted(context: BuildContext) -> GradientPredictor:
    """Return the predictor before its fit.

    Raises:
        UnsupportedError: the model does not support one, or not in this memory.
    """
    if is_sharded(context.model):
        raise UnsupportedError("the gradient predictor reads whole weights, and FSDP shards them")
    predictor = GradientPredictor(context.model, context.parameters, context.objective)
    if predictor.fitting_bytes > context.config.memory_budget:
        raise UnsupportedError(
            f"memory_budget={context.config.memory_budget}: fitting the gradient predictor takes "
            f"{predictor.fitting_bytes / 2**30:.1f} GiB. Raise memory_budget"
        )
    return predictor


def _split(total: int) -> tuple[list[int], list[int]]:
    """Return rows to fit on and rows to judge the fit on; the same where there are no more."""
    held_out = _spread(total, _HELD_OUT_ROWS)
    fit_rows = [index for index in _spread(total, _FIT_ROWS + _HELD_OUT_ROWS) if index not in set(held_out)]
    return fit_rows or held_out, held_out


def _counted(rows: TrainingRows, row_indices: list[int], bar: tqdm) -> Iterator[Batch]:
    """Yield the batches of these rows, counted on a progress bar."""
    for indices, batch in rows.batches(row_indices):
        yield batch
        bar.update(len(indices))


def _spread(total: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly spread over `total`."""
    return sorted({round(at * (total - 1) / max(count - 1, 1)) for at in range(min(count, total))})
