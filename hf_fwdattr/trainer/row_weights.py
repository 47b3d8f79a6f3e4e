"""Which rows each optimizer step saw, and with what weight; recorded without touching the training loop.

The rows' positions travel inside the batches themselves, so prefetching, workers and sharding cannot misalign them:
the dataset is wrapped to say each row's position, the collator turns positions into a tensor beside the batch, and a
hook on the model takes that tensor out again before the forward pass sees it. What a row's loss weighed is measured
rather than deduced: the gradient that arrives at the model's own loss holds every factor of the training loop
(accumulation, number of processes, a gradient scaler), however the loop was written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import UnsupportedError
from ..models.likelihood import IGNORED
from .streams import KEY, MarkedStream


class Indexed:
    """A map-style dataset whose rows know their position."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._marked(index, self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__(indices) if hasattr(self.dataset, "__getitems__") else None
        rows = [self.dataset[i] for i in indices] if rows is None else rows
        return [self._marked(i, row) for i, row in zip(indices, rows, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while being unpickled in a worker, before __init__'s attribute is there
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _marked(self, index: int, row: Any) -> dict[str, Any]:
        if not hasattr(row, "keys"):
            raise UnsupportedError(f"row {index} of the dataset is a {type(row).__name__}; rows must be dictionaries")
        return {**row, KEY: int(index)}


class MarkedCollate:
    """The trainer's collator, with the rows' positions put beside what it returns."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        rows = torch.tensor([feature.pop(KEY) for feature in features])
        batch = self.collate(features)
        batch[KEY] = rows
        return batch


def loader_of(dataloader: Any, row_id_column: str | None = None) -> DataLoader:
    """The DataLoader inside the prepared one.

    Raises:
        UnsupportedError: a dataset without random access whose rows have no ids.
    """
    loader: DataLoader = getattr(dataloader, "base_dataloader", dataloader)
    if not streams(loader) and not hasattr(loader.dataset, "__len__"):
        raise UnsupportedError(
            f"a {type(loader.dataset).__name__} has no length: give a dataset, or an IterableDataset"
        )
    if streams(loader) and row_id_column is None:
        raise UnsupportedError(
            "the training set is a stream: its rows have no position to attribute to. Give them a column of whole "
            "numbers and name it in ResponseConfig(row_id_column=...), or use a map-style dataset "
            "(`Dataset.from_generator`)"
        )
    return loader


def streams(loader: DataLoader) -> bool:
    """Whether its dataset has no random access."""
    return isinstance(loader.dataset, IterableDataset)


@dataclass
class MicroBatch:
    """One micro-batch that went forward. Numbers stay tensors on their device: reading one would make a GPU wait.

    Attributes:
        rows (`Tensor`): (n,) positions.
        tokens (`Tensor`, *optional*): what the model divided its summed loss by: the supervised tokens of the whole
            step where it was told them, otherwise its own; None where it saw no labels.
        pull (`Tensor`, *optional*): the gradient that came back to the model's loss: whatever the training loop
            multiplied it with. Where the model returns its tokens' log-likelihoods instead, as TRL's does, what came
            back to those, negative.
        least (`Tensor`, *optional*): the least that came back to a token; other than `pull`, tokens weigh unequally.
    """

    rows: Tensor
    tokens: Any = None
    pull: Tensor | None = None
    least: Tensor | None = None

    def apply_row_weights(self, gradient: Tensor) -> None:
        """Note what came back to the log-likelihoods of tokens, whose weight is then all there is to know."""
        self.tokens, self.pull, self.least = 1, -gradient.detach().min(), -gradient.detach().max()


@dataclass
class Step:
    """The micro-batches of an optimizer step, and what else scaled its gradient."""

    rate: float
    micro: list[MicroBatch]
    clip: Any = 1.0
    unscale: float = 1.0

    def finalize(self, ranks: int, rule: float | None) -> tuple[float, Tensor, Tensor, float]:
        """Rate, rows (n,), the weight of each one's summed loss (n,), and clip, as numbers on the CPU.

        Args:
            ranks (`int`): processes over whose gradients the step took the mean.
            rule (`float`, *optional*): the pull to assume where the model's loss is not used (label smoothing).

        Raises:
            UnsupportedError: training did not use the model's loss.
        """
        rows, weights = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)]
        for micro in self.micro:
            pull = rule if micro.pull is None else float(micro.pull) / self.unscale
            if pull is None or micro.tokens is None:
                raise UnsupportedError(
                    "training does not use the loss that the model returns for `labels` (a custom loss, or label "
                    "smoothing of a model that is not told num_items_in_batch), so what a row's loss was is unknown; "
                    "train with the model's own loss"
                )
            if micro.least is not None and float(micro.least) < (1.0 - 1e-3) * float(micro.pull or 0.0):
                raise UnsupportedError(
                    "the training loss weighs some tokens more than others (loss_type='dft', for one), so it is not "
                    "the likelihood that is attributed; train with the plain one"
                )
            weight = pull / max(float(micro.tokens), 1.0) / ranks
            rows.append(micro.rows.cpu().reshape(-1))
            weights.append(torch.full((micro.rows.numel(),), weight, dtype=torch.float64))
        return self.rate, torch.cat(rows), torch.cat(weights), min(1.0, float(self.clip))


class BatchRecorder:
    """Attached to a prepared dataloader and a model; collects the micro-batches of a step until they are taken.

    Args:
        model (`nn.Module`): the model that the training loop calls, with whatever it is wrapped in.
        loader (`DataLoader`): see `loader_of`.
        shifted (`bool`): whether the first label of a row is not supervised (causal language models).
        row_id_column (`str`, *optional*): by which the rows of a stream are known; positions are not used then.
    """

    def __init__(self, model: nn.Module, loader: DataLoader, shifted: bool, row_id_column: str | None = None):
        self.loader, self.shifted = loader, shifted
        self.dataset, self.collate = self.loader.dataset, self.loader.collate_fn
        self.micro: list[MicroBatch] = []
        stream = streams(loader) and row_id_column is not None
        marked = MarkedStream(self.dataset, str(row_id_column)) if stream else Indexed(self.dataset)
        # DataLoader forbids assigning .dataset after construction, although it only reads it when iteration begins.
        object.__setattr__(self.loader, "dataset", marked)
        self.loader.collate_fn = MarkedCollate(self.collate)
        self.handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave),
        ]
        self._open: MicroBatch | None = None

    def detach(self) -> None:
        """Put dataset and collator back and remove the hooks."""
        for handle in self.handles:
            handle.remove()
        object.__setattr__(self.loader, "dataset", self.dataset)
        self.loader.collate_fn = self.collate

    def take(self) -> list[MicroBatch]:
        """The micro-batches since the last call."""
        taken, self.micro = self.micro, []
        return taken

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = kwargs.pop(KEY, None)
        self._open = None
        if rows is not None and module.training:
            self._open = MicroBatch(rows, kwargs.get("num_items_in_batch"))
            labels = kwargs.get("labels")
            if self._open.tokens is None and labels is not None:
                counted = labels[:, 1:] if self.shifted and labels.ndim > 1 else labels
                self._open.tokens = (counted != IGNORED).sum()
            self.micro.append(self._open)
        return args, kwargs

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        micro, self._open = self._open, None
        if micro is None or not hasattr(output, "get"):
            return
        loss, tokens = output.get("loss"), output.get("log_probs")
        if isinstance(tokens, Tensor) and tokens.requires_grad:  # TRL's models have both, and it uses these
            tokens.register_hook(micro.apply_row_weights)
        elif isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda gradient: setattr(micro, "pull", gradient.detach()))
