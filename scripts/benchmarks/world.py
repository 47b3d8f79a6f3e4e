"""The interfaces of worlds and methods.

A new world is a subclass of `LanguageModelWorld` or `ClassificationWorld` in a file of `worlds/`: class attributes,
`model`, `rows`, `queries`, and the decorator `@world("name")`. A new method is a subclass of `Method` in a file of
`methods/` with the decorator `@method("name")`; worlds name it in `lines`.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.models.likelihood import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Objective, row_losses
from hf_fwdattr.query.inputs import pad_queries
from hf_fwdattr.trainer.reweighting import apply_row_weights

from .corpora import cache_folder


__all__ = ["ClassificationWorld", "LanguageModelWorld", "Method", "Scores", "World"]


class World(ABC):
    """A model, its training rows and its queries.

    Attributes:
        options: that this world was loaded with, for processes that load it again.
        version: name of the world's retrainings in the cache; it must change with anything that changes an outcome.
        training: what differs from the Trainer's own defaults.
        seed: of the run that is attributed.
        bank: settings of every bank of this world.
        lines: label -> (method, settings), what `lds` compares.
        halves, seeds: retrainings that `lds` makes unless told otherwise.
        source_column: of the rows; `sources` are its values, and `row_sources` (rows,) says which each row has.
        mislabelled: (rows,) booleans, where some rows carry a wrong label on purpose.
    """

    name: str
    options: Mapping[str, Any] = {}
    version: str
    objective: ClassVar[Objective]
    training: ClassVar[dict[str, Any]] = {}
    seed: ClassVar[int] = 0
    bank: ClassVar[dict[str, Any]] = {}
    lines: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {}
    halves: ClassVar[int] = 64
    seeds: ClassVar[int] = 3
    query_size: ClassVar[int] = 32
    source_column: ClassVar[str | None] = None
    sources: Sequence[str] = ()
    row_sources: Tensor
    mislabelled: Tensor | None = None
    rows: Dataset
    queries: Any

    @abstractmethod
    def model(self) -> nn.Module:
        """Return the model before training, with the same initial weights on every call."""

    @abstractmethod
    def batches(self, rows: Any, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield what the model's forward takes of rows or queries, in their order."""

    def texts(self, rows: Any) -> list[str]:
        """Return the text of rows or queries, for methods that read it."""
        raise NotImplementedError(f"{self.name} has no text")

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate a training batch."""
        return default_data_collator(features)

    def arguments(self, folder: str, **changes: Any) -> TrainingArguments:
        """Return the arguments of a fine-tune: the Trainer's own defaults, unless this world says otherwise."""
        settings = dict(
            output_dir=folder, save_strategy="no", report_to=[], use_cpu=True, logging_strategy="no",
            disable_tqdm=True, seed=self.seed,
        )  # fmt: skip
        return TrainingArguments(**(settings | self.training | changes))

    def trainer(
        self, folder: str, callbacks: Sequence[Any] = (), dtype: torch.dtype | None = None, **changes: Any
    ) -> Trainer:
        """Return the untrained Trainer with all rows; `changes` are of the arguments."""
        model = self.model() if dtype is None else self.model().to(dtype)
        return Trainer(
            model=model, args=self.arguments(folder, **changes), train_dataset=self.rows,
            data_collator=self.collate, callbacks=list(callbacks),
        )  # fmt: skip

    @cached_property
    def trained(self) -> nn.Module:
        """The model of the run that is attributed, in evaluation mode."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder)
            trainer.train()
        return trainer.model.eval()

    @torch.no_grad()
    def losses(self, model: nn.Module, rows: Any = None, size: int | None = None) -> Tensor:
        """Return summed losses (queries,) in nats, float64; of the queries unless rows are given."""
        batches = self.batches(self.queries if rows is None else rows, size or self.query_size)
        outputs = (self.objective.forward(model, batch) for batch in batches)
        return torch.cat([row_losses(logits.double(), labels) for logits, labels in outputs])

    def outcome(self, rows: Tensor, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Retrain, and return the queries' losses.

        Args:
            rows (`Tensor`): (rows,) booleans that keep rows, or float weights of their losses in the same batches.
        """
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, seed=seed, dtype=dtype)
            if rows.dtype == torch.bool:
                trainer.train_dataset = self.rows.select(rows.nonzero().flatten().tolist())
            else:
                apply_row_weights(trainer, rows)
            trainer.train()
        return self.losses(trainer.model.eval())

    def retrain(
        self, subsets: Tensor, seeds: Sequence[int], workers: int = 1, title: str = "retraining", double: bool = False
    ) -> Tensor:
        """Return outcomes (seeds, subsets, queries) of retrainings, which are kept: a killed run goes on."""
        name, dtype = self.version + ("-float64" if double else ""), torch.float64 if double else None
        train = (
            partial(self.outcome, dtype=dtype) if workers == 1 else partial(_outcome, self.name, self.options, dtype)
        )
        folder = cache_folder() / "retrainings"
        return retrain(train, subsets, seeds, folder, title, workers=workers, name=name)


def _outcome(name: str, options: Mapping[str, Any], dtype: torch.dtype | None, rows: Tensor, seed: int) -> Tensor:
    """Retrain in another process, which loads the world by its name."""
    from .registry import load_world

    return load_world(name, **options).outcome(rows, seed, dtype)


class LanguageModelWorld(World):
    """A causal language model; queries are token lists, `input_ids` and `labels`."""

    objective = CAUSAL_LM
    query_size = 1
    bank: ClassVar[dict[str, Any]] = {"parameters": "lora"}

    def token_lists(self, rows: Any = None) -> list[dict[str, list[int]]]:
        """Return `input_ids` and `labels` of rows, of the queries unless rows are given."""
        rows = self.queries if rows is None else rows
        return [{"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])} for row in rows]

    def batches(self, rows: Any, size: int) -> Iterator[dict[str, Tensor]]:
        lists = self.token_lists(rows)
        for start in range(0, len(lists), size):
            yield pad_queries(lists[start : start + size], torch.device("cpu"))


class ClassificationWorld(World):
    """A classifier; queries are rows of a dataset with the labels that are asked about."""

    objective = SEQUENCE_CLASSIFICATION
    bank: ClassVar[dict[str, Any]] = {"parameters": "trainable"}

    def batches(self, rows: Any, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), size):
            yield self.collate([rows[index] for index in range(start, min(start + size, len(rows)))])

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the share of queries whose label is the likeliest."""
        outputs = [self.objective.forward(model, batch) for batch in self.batches(self.queries, 32)]
        return float(torch.cat([logits.argmax(-1).eq(labels).flatten() for logits, labels in outputs]).double().mean())


@dataclass
class Scores:
    """Scores of a method.

    Attributes:
        values: (queries, rows); a larger score says that the row makes the query likelier. None: it has none.
        cost: seconds, bytes and the like, by name.
        own: (rows,) how much of its own label each row explains, for finding wrong labels.
    """

    values: Tensor | None
    cost: dict[str, Any] = field(default_factory=dict)
    own: Tensor | None = None


class Method(ABC):
    """A way of scoring training rows."""

    @abstractmethod
    def scores(self, world: World) -> Scores:
        """Score every row of a world for every query."""
