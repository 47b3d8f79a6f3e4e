"""Baselines: gradient dot product, BM25, the row's own loss, and the pixels of images."""

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_fwdattr.demo.ask import TextSimilarity
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import CAUSAL_LM, Batch, Objective
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters

from ..registry import method
from ..world import Method, Scores, World


def gradients(
    model: nn.Module, batches: Iterable[Batch], parameters: str | list[str] = "lora", objective: Objective = CAUSAL_LM
) -> Tensor:
    """Return gradients (rows, P) of the rows' losses."""
    tracked = TrackedParameters.of(model, parameters)  # of a frozen model none would be trainable
    with frozen(model):
        per_sample = PerSampleGradients(model, tracked, objective)
        return torch.cat([per_sample(batch)[0] for batch in batches])


@method("gradient-dot")
class GradientDot(Method):
    """Gradient dot product at the end of training, over the tracked parameters."""

    def __init__(self, own: bool = False):
        self.own = own

    def scores(self, world: World) -> Scores:
        model, parameters = world.trained, world.bank["parameters"]

        def of(rows: object, size: int) -> Tensor:
            return gradients(model, world.batches(rows, size), parameters, world.objective)

        began = time.process_time()
        rows = of(world.rows, 16)
        built = time.process_time()
        values = of(world.queries, 16) @ rows.T
        cost = {
            "build s": built - began, "s / query": (time.process_time() - built) / len(values),
            "bytes / row": 4.0 * rows.shape[1],
        }  # fmt: skip
        return Scores(values, cost, (rows @ rows.T).diagonal() if self.own else None)


def bm25(rows: Sequence[str], queries: Sequence[str], stopwords: bool = True) -> Tensor:
    """Return BM25 (queries, rows)."""
    similarity = TextSimilarity(rows, stopwords=stopwords)
    return torch.stack([torch.from_numpy(similarity.scores(query)) for query in queries]).double()


@method("bm25")
class BM25(Method):
    """BM25 of the rows' words for the query's words."""

    def scores(self, world: World) -> Scores:
        began = time.process_time()
        values = bm25(world.texts(world.rows), world.texts(world.queries))
        return Scores(values, {"build s": 0.0, "s / query": (time.process_time() - began) / len(values)})


@method("row-loss")
class RowLoss(Method):
    """The row's own loss after training, for finding wrong labels; it scores no queries."""

    def scores(self, world: World) -> Scores:
        return Scores(None, own=world.losses(world.trained, world.rows))


@method("pixels")
class Pixels(Method):
    """Cosine of the images: for a row of the query's class, and a ninth of it against a row of another class."""

    def scores(self, world: World) -> Scores:
        parts = (world.queries, world.rows)
        x, y = (torch.nn.functional.normalize(part["pixel_values"][:].flatten(1), dim=1) for part in parts)
        same = world.queries["labels"][:][:, None] == world.rows["labels"][:][None]
        return Scores((x @ y.T) * torch.where(same, 1.0, -1.0 / 9))
