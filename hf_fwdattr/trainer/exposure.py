"""Which rows each optimizer step saw, and with what weight; recorded without touching the training loop.

The rows' positions travel inside the batches themselves, so prefetching, workers and sharding cannot misalign them:
the dataset is wrapped to say each row's position, the collator turns positions into a tensor beside the batch, and a
hook on the model takes that tensor out again before the forward pass sees it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import UnsupportedError


KEY = "fwdattr_rows"


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


def loader_of(dataloader: Any) -> DataLoader:
    """The DataLoader inside the trainer's prepared one.

    Raises:
        UnsupportedError: a dataset without random access.
    """
    loader: DataLoader = getattr(dataloader, "base_dataloader", dataloader)
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise UnsupportedError(
            "the training set is a stream: rows have no position to attribute to. Use a map-style dataset "
            "(for example `Dataset.from_generator`), or train without ResponseCallback"
        )
    return loader


class Exposure:
    """Attached to a prepared dataloader and a model; collects (rows, weight) of every micro-batch until taken.

    Args:
        model (`nn.Module`): the trainer's model.
        loader (`DataLoader`): see `loader_of`.
    """

    def __init__(self, model: nn.Module, loader: DataLoader):
        self.loader = loader
        self.dataset, self.collate = self.loader.dataset, self.loader.collate_fn
        self.micro: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        # DataLoader forbids assigning .dataset after construction, although it only reads it when iteration begins.
        object.__setattr__(self.loader, "dataset", Indexed(self.dataset))
        self.loader.collate_fn = MarkedCollate(self.collate)
        self.handle = model.register_forward_pre_hook(self._take, with_kwargs=True, prepend=True)

    def detach(self) -> None:
        """Put dataset and collator back and remove the hook."""
        self.handle.remove()
        object.__setattr__(self.loader, "dataset", self.dataset)
        self.loader.collate_fn = self.collate

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = kwargs.pop(KEY, None)
        if rows is not None and module.training:
            # Tensors are kept as they are: reading a number here would make the GPU wait.
            self.micro.append((rows, kwargs.get("num_items_in_batch"), kwargs.get("labels")))
        return args, kwargs

    def step(self, shifted: bool) -> tuple[Tensor, Tensor]:
        """Rows (n,) of the optimizer step that just ended and the weight 1 / n_t of each one's summed loss (n,).

        Args:
            shifted (`bool`): whether the first label of a row is not supervised (causal language models).
        """
        rows, weights = [], []
        for positions, items, labels in self.micro:
            if items is not None:  # the loss was divided by the supervised tokens of the whole step
                weight = 1.0 / float(items)
            else:  # it was a mean over the micro-batch, and then over micro-batches
                if labels is None:
                    raise UnsupportedError(
                        "the model was called without labels (a custom loss, or label smoothing), so what a row's "
                        "loss was is unknown; train with the model's own loss"
                    )
                counted = labels[:, 1:] if shifted and labels.ndim > 1 else labels
                weight = 1.0 / max(int((counted != -100).sum()), 1) / len(self.micro)
            rows.append(positions.cpu().reshape(-1))
            weights.append(torch.full((positions.numel(),), weight, dtype=torch.float64))
        self.micro = []
        if not rows:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        return torch.cat(rows), torch.cat(weights)
