"""What a bank keeps so that one forward pass gives a first look at every row: maps of errors, and their worth."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UnsupportedError
from ..gradients.per_sample import PerSampleGradients
from ..gradients.predictor import GradientPredictor
from ..models.fsdp import is_sharded
from ..models.likelihood import Batch, Objective
from ..models.parameters import Parameters
from ..query.gaussian_process import error_covariance
from ..response.dataset import TrainingRows


_FITTED = 512  # rows from which the maps are fitted, at most: some dozens of tokens a row against d^2 numbers a map
_HELD = 32  # rows on which they are judged, at most
_TOGETHER = 128  # predicted gradients that are multiplied with the responses together
logger = logging.getLogger(__name__)


@dataclass
class FittedPredictor:
    """Maps of errors by canonical path of the layer, and the share of score variance that they explain.

    Attributes:
        maps (`dict[str, Tensor]`): see `synthetic.gradients`.
        share (`float`): of the scores of rows that were not fitted on, 1 at best; may be negative.
        kernel (`Tensor`, *optional*): (rows, rows) how its errors go together, see `kriging`.
    """

    maps: dict[str, Tensor]
    share: float
    kernel: Tensor | None


def cost_of(
    model: nn.Module, parameters: Parameters, objective: Objective, rows: int, memory: int, learned: bool
) -> tuple[int, int]:
    """Rows that `gradient_predictor` will read of so many (those it is judged on twice, or all where its errors are
    `learned`), and bytes that fitting holds; zeros where there will be none.
    """
    try:
        synthetic = _synthetic(model, parameters, objective, memory)
    except UnsupportedError:
        return 0, 0
    fitted, held = _chosen(rows)
    return len(fitted) + (rows if learned else 2 * len(held)), synthetic.fitting_bytes


def fit_predictor(
    model: nn.Module,
    parameters: Parameters,
    objective: Objective,
    rows: TrainingRows,
    products: Callable[[Tensor], Tensor],
    memory: int,
    scores: Tensor | None = None,
    quiet: bool = True,
) -> FittedPredictor | None:
    """Fit the maps of a model at the end of its training, and judge them; None where they cannot be had.

    Args:
        rows (`TrainingRows`): the training set; a few hundred rows of it are read.
        products (`Callable`): gradients (queries, P) -> their products with all rows' responses (queries, rows).
        memory (`int`): bytes that fitting may take.
        scores (`Tensor`, *optional*): (rows, rows) of all rows as queries; all rows are then read, for the kernel.
        quiet (`bool`, defaults to `True`): no progress bars.
    """
    fitted, held = _chosen(len(rows))
    try:
        synthetic = _synthetic(model, parameters, objective, memory)
        with tqdm(total=len(fitted), desc="first look", unit="row", disable=quiet, leave=False) as bar:
            maps = synthetic.fit(_counted(rows, fitted, bar))
        if scores is None:
            gradients = PerSampleGradients(model, parameters, objective)
            found = [(places, products(-gradients(batch)[0].cpu())) for places, batch in rows.batches(held)]
            exact = torch.cat([block for _, block in found])[torch.cat([places for places, _ in found]).argsort()]
            predicted = _predicted(synthetic, rows, held, products, quiet=True)
        else:
            exact, predicted = scores[held], _predicted(synthetic, rows, list(range(len(rows))), products, quiet)
    except UnsupportedError as error:  # the responses, which took longer, are not lost with it
        logger.info("the bank allows no first look (a query will take a forward pass for each direction): %s", error)
        return None
    kernel = None if scores is None else error_covariance(scores - predicted)
    missed = exact - (predicted if scores is None else predicted[held])
    return FittedPredictor(maps, 1.0 - float(missed.square().sum() / exact.square().sum().clamp(min=1e-30)), kernel)


def _predicted(
    synthetic: GradientPredictor,
    rows: TrainingRows,
    places: list[int],
    products: Callable[[Tensor], Tensor],
    quiet: bool,
) -> Tensor:
    """(len(places), rows) what a first look says of the rows at these ascending positions as queries."""
    found: list[Tensor] = []
    waiting: list[Tensor] = []
    order: list[int] = []
    total = rows.count(len(places))
    for here, batch in tqdm(rows.batches(places), "first look", total, unit="batch", disable=quiet, leave=False):
        order += [int(place) for place in here]
        waiting.append(synthetic(batch).cpu())
        if sum(map(len, waiting)) >= _TOGETHER:
            found.append(products(torch.cat(waiting)))
            waiting = []
    found += [products(torch.cat(waiting))] if waiting else []
    result = torch.cat(found)
    return result[torch.tensor(order).argsort()]


def _synthetic(model: nn.Module, parameters: Parameters, objective: Objective, memory: int) -> GradientPredictor:
    """What is fitted, before it is.

    Raises:
        UnsupportedError: it cannot be, or not in this memory.
    """
    if is_sharded(model):
        raise UnsupportedError("it reads weights as a whole, and FSDP has them in pieces")
    synthetic = GradientPredictor(model, parameters, objective)
    if synthetic.fitting_bytes > memory:
        raise UnsupportedError(
            f"fitting the maps would take {synthetic.fitting_bytes / 2**30:.1f} GiB, more than memory_budget"
        )
    return synthetic


def _chosen(total: int) -> tuple[list[int], list[int]]:
    """Rows to fit on, and rows to judge by; the same where there are no more."""
    held = _spread(total, _HELD)
    return [place for place in _spread(total, _FITTED + _HELD) if place not in set(held)] or held, held


def _counted(rows: TrainingRows, chosen: list[int], bar: tqdm) -> Iterator[Batch]:
    """The batches of these rows, shown on a bar."""
    for at, batch in rows.batches(chosen):
        yield batch
        bar.update(len(at))


def _spread(total: int, count: int) -> list[int]:
    """At most `count` positions, evenly over all."""
    return sorted({round(at * (total - 1) / max(count - 1, 1)) for at in range(min(count, total))})
