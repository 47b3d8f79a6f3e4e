"""The response bank: made by the real callback in a fine-tune of the world, and asked with all of its directions."""

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.query.batch import batch_scores
from hf_fwdattr.query.loading import AutoModelForAttribution
from hf_fwdattr.query.scorer import Scorer

from ..corpora import cache_folder
from ..registry import method
from ..world import Method, Scores, World


@dataclass
class AttributedRun:
    """A fine-tuned model with its bank.

    Attributes:
        build_s: processor's seconds of everything that is not training.
    """

    model: nn.Module
    bank: ResponseBank
    build_s: float

    def scorer(self) -> Scorer:
        """Return the scorer of a language model's queries."""
        return Scorer(self.bank, self.model)

    def source_scores(self, world: World) -> Tensor:
        """Return scores (queries, sources) in the order of the world's sources."""
        order = [self.bank.manifest.sources.index(name) for name in world.sources]
        return self.scorer().source_scores(world.token_lists())[:, order].double()

    def bytes_per_row(self, *kinds: str) -> float:
        """Return how much of these kinds of shards the bank stores for each row."""
        files = self.bank.manifest.files
        return sum(file.size for file in files if file.kind in kinds) / self.bank.manifest.dataset.rows


@contextmanager
def attributed_run(world: World, **settings: Any) -> Iterator[AttributedRun]:
    """Fine-tune a world with the callback; the bank is there as long as the context is open."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, callback = _train(world, folder, settings)
        yield AttributedRun(trainer.model.eval(), callback.bank, callback.build_s)


def kept_run(world: World, **settings: Any) -> AttributedRun:
    """Fine-tune a world with the callback once, and return the run from the cache afterwards."""
    key = hashlib.sha256(f"{world.version} {world.bank | settings}".encode()).hexdigest()[:12]
    folder = cache_folder() / "runs" / f"{world.name}-{key}"
    if not (folder / "fwdattr" / "bank.json").exists():
        _train(world, str(folder), settings)[0].save_model(str(folder))
    model = AutoModelForAttribution.from_pretrained(str(folder))
    return AttributedRun(model.eval(), ResponseBank.from_pretrained(folder), 0.0)


class _TimedCallback(ResponseCallback):
    def on_train_end(self, *args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        control = super().on_train_end(*args, **kwargs)
        self.build_s = time.process_time() - began
        return control


def _train(world: World, folder: str, settings: dict[str, Any]) -> tuple[Trainer, _TimedCallback]:
    callback = _TimedCallback(ResponseConfig(quiet=True, **(world.bank | settings)))
    trainer = world.trainer(folder, [callback])
    trainer.train()
    return trainer, callback


@method("bank")
class Bank(Method):
    """Response bank with exact scores or so many directions, at the end of the run or averaged over it."""

    def __init__(self, own: bool = False, **settings: Any):
        self.own, self.settings = own, settings

    def scores(self, world: World) -> Scores:
        with attributed_run(world, **self.settings) as run:
            began = time.process_time()
            values = self._values(world, run, world.queries)
            spent = time.process_time() - began
            own = self._values(world, run, world.rows).diagonal() if self.own else None
            manifest = run.bank.manifest
            cost = {
                "directions": manifest.directions, "explained variance": manifest.explained_variance,
                "build s": run.build_s, "s / query": spent / len(world.queries),
                "bytes / row": run.bytes_per_row("coordinates"),
            }  # fmt: skip
        return Scores(values, cost, own)

    def _values(self, world: World, run: AttributedRun, rows: Any) -> Tensor:
        if world.objective is CAUSAL_LM:
            return run.scorer().scores(world.token_lists(rows), batch_size=1, budget="all")
        batches = world.batches(rows, world.query_size)
        return torch.cat([batch_scores(run.model, run.bank, batch) for batch in batches])


@method("two-stages")
class TwoStages(Method):
    """Coarse scores of all rows from one forward pass, then exact scores of the best within a budget of passes.

    With `whole`, the budget corrects all scores along linear combinations of rows, and none is named.
    """

    def __init__(self, budget: int = 128, top: int = 10, whole: bool = False, **settings: Any):
        self.budget, self.top, self.whole, self.settings = budget, top, whole, settings

    def scores(self, world: World) -> Scores:
        queries = world.token_lists()
        with attributed_run(world, **self.settings) as run:
            scorer, began = run.scorer(), time.process_time()
            if self.whole:
                values = scorer.scores(queries, budget=self.budget)
            else:
                values = torch.stack([scorer.rank(query, self.top, self.budget).scores for query in queries])
            spent = time.process_time() - began
            kinds = ("coordinates", "row_codes")
            cost = {
                "directions": run.bank.manifest.directions, "build s": run.build_s, "s / query": spent / len(queries),
                "bytes / row": run.bytes_per_row(*kinds),
            }  # fmt: skip
        return Scores(values, cost)
