"""Row weights: the rows that each optimizer step saw and the weight of each row's loss, measured during training.

The row indices travel inside the batches themselves, so prefetching, workers and sharding cannot misalign them: the
dataset adds each row's index, the collator turns the indices into a tensor beside the batch, and a hook on the model
takes that tensor out again before the forward pass sees it. The weight of a row's loss is measured, not deduced: the
gradient that arrives at the model's own loss holds every factor of the training loop (accumulation, number of
processes, a gradient scaler), however the loop is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import UnsupportedError
from .capture import TrainingCapture
from .guard import Guard
from .patching import Patches
from .step_checks import LoopChecks
from .streams import NO_ROW_ID, ROW_KEY, IndexedRow, IndexedStream
from .value_checks import divisor


__all__ = [
    "BatchRecorder",
    "IndexedCollator",
    "IndexedDataset",
    "MicroBatch",
    "OptimizerStep",
    "base_loader",
    "is_stream",
]


class IndexedDataset:
    """A map-style dataset that adds each row's index to its features; beside a row that is no dictionary."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return _indexed(int(index), self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        rows = self.dataset.__getitems__(indices) if hasattr(self.dataset, "__getitems__") else None
        rows = [self.dataset[i] for i in indices] if rows is None else rows
        return [_indexed(int(i), row) for i, row in zip(indices, rows, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while being unpickled in a worker, before __init__'s attribute is there
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _indexed(index: int, row: Any) -> Any:
    return {**row, ROW_KEY: index} if hasattr(row, "keys") else IndexedRow(row, index)


class IndexedCollator:
    """A collator that adds the tensor of row indices to the batch of another one."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        row_indices = [row.row_index if isinstance(row, IndexedRow) else row.pop(ROW_KEY) for row in rows]
        batch = self.collate([row.row if isinstance(row, IndexedRow) else row for row in rows])
        batch[ROW_KEY] = torch.tensor(row_indices)
        return batch


def base_loader(dataloader: Any, row_id_column: str | None = None) -> DataLoader:
    """Return the DataLoader inside one that Accelerate prepared.

    Raises:
        UnsupportedError: the dataset has no random access and its rows have no ids.
    """
    loader: DataLoader = getattr(dataloader, "base_dataloader", dataloader)
    if not is_stream(loader) and not hasattr(loader.dataset, "__len__"):
        raise UnsupportedError(
            f"dataset: a {type(loader.dataset).__name__} has no length, so its rows have no index. Pass a map-style "
            "dataset, or an IterableDataset"
        )
    if is_stream(loader) and row_id_column is None:
        raise UnsupportedError(
            "the training set is a stream, whose rows have no index. Give them a column of whole numbers and name it "
            "in ResponseConfig(row_id_column=...), or pass a map-style dataset (`Dataset.from_generator`)"
        )
    return loader


def is_stream(loader: DataLoader) -> bool:
    """Return whether the dataset has no random access."""
    return isinstance(loader.dataset, IterableDataset)


@dataclass
class MicroBatch:
    """A micro-batch that went forward. Numbers stay tensors on their device, as reading one makes a GPU wait.

    Attributes:
        row_indices (`Tensor`): (n,).
        tokens (`Tensor`, *optional*): the divisor of the model's summed loss: the supervised tokens of the whole step
            where the model is told them, otherwise of this micro-batch; None without labels.
        loss_gradient (`Tensor`, *optional*): gradient of the training objective by the model's loss, with whatever the
            loop multiplied it. Of a model that returns log-likelihoods of tokens, as TRL's do: the largest negative
            gradient by one of those.
        least_gradient (`Tensor`, *optional*): the smallest of those; it differs where tokens weigh unequally.
        captured (`CapturedBatch`, *optional*): gradients of the rows, until the step is committed.
    """

    row_indices: Tensor
    tokens: Any = None
    loss_gradient: Tensor | None = None
    least_gradient: Tensor | None = None
    captured: Any = None

    def record_token_gradients(self, gradient: Tensor) -> None:
        """Record the gradient by the tokens' log-likelihoods, which holds their whole weight: the divisor is one."""
        least, largest = gradient.detach().aminmax() if gradient.numel() else [gradient.new_zeros(())] * 2
        self.tokens, self.loss_gradient, self.least_gradient = 1, -least, -largest


@dataclass
class OptimizerStep:
    """The micro-batches of an optimizer step, and the other factors of its gradient.

    Attributes:
        rate (`float`): learning rate; 0 for a step that the gradient scaler skipped.
        micro_batches (`list[MicroBatch]`): of this process.
        clip: factor of gradient clipping.
        loss_scale (`float`): factor of the gradient scaler.
    """

    rate: float
    micro_batches: list[MicroBatch]
    clip: Any = 1.0
    loss_scale: float = 1.0

    def with_known_rows(self) -> "OptimizerStep":
        """Return this step.

        Raises:
            UnsupportedError: no micro-batch of its dataloader went through the model.
        """
        if not self.micro_batches:
            raise UnsupportedError(
                "the model is not called with the batches of the dataloader (a trainer that makes its own of them, as "
                "DPO does of pairs), so the rows of this step are unknown. Train on the dataloader's batches"
            )
        return self

    def finalize(self, processes: int, loss_gradient: float | None) -> tuple[float, Tensor, Tensor, float]:
        """Return rate, row indices (n,), weights of the rows' summed losses (n,) and clip, as numbers on the CPU.

        Args:
            processes (`int`): processes over whose gradients the step took the mean.
            loss_gradient (`float`, *optional*): stands in where the model's loss is not used (label smoothing).

        Raises:
            UnsupportedError: training does not use the model's loss, or weighs its tokens unequally.
        """
        row_indices, weights = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)]
        for micro in self.micro_batches:
            measured, least = micro.loss_gradient, micro.least_gradient
            gradient = loss_gradient if measured is None else float(measured) / self.loss_scale
            if gradient is None or micro.tokens is None:
                raise UnsupportedError(
                    "training does not use the loss that the model returns for `labels` (a custom loss, or label "
                    "smoothing of a model that is not told num_items_in_batch), so a row's loss is unknown. Train "
                    "with the model's own loss"
                )
            if least is not None and float(least) < (1.0 - 1e-3) * float(measured or 0.0):
                raise UnsupportedError(
                    "the training loss weighs some tokens more than others (loss_type='dft', for one), so it is not "
                    "the likelihood that is attributed. Train with the plain one"
                )
            weight = gradient / max(float(micro.tokens), 1.0) / processes
            row_indices.append(micro.row_indices.cpu().reshape(-1))
            if bool((row_indices[-1] == NO_ROW_ID).any()):
                raise UnsupportedError(
                    "row_id_column: a row of the stream has no whole number there, so it has no name. "
                    "`Dataset.map(lambda row, i: {...: i}, with_indices=True)` right after loading gives one"
                )
            weights.append(torch.full((micro.row_indices.numel(),), weight, dtype=torch.float64))
        return self.rate, torch.cat(row_indices), torch.cat(weights), min(1.0, float(self.clip))


class BatchRecorder:
    """Recorder of the micro-batches that a model trains on, until they are taken.

    Args:
        model (`nn.Module`): the model that the training loop calls, with its wrappers.
        loader (`DataLoader`): see [`base_loader`].
        patches (`Patches`): undo the changes of model and loader.
        shifted (`bool`): whether the first label of a row is not supervised (causal language models).
        row_id_column (`str`, *optional*): column that names the rows of a stream; not used with random access.
        checks (`LoopChecks`, *optional*): compare the values of losses, and measure their divisor.
        guard (`Guard`, *optional*): keeps errors once training has begun.
        capture (`TrainingCapture`, *optional*): takes the rows' gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: DataLoader,
        patches: Patches,
        shifted: bool,
        row_id_column: str | None = None,
        checks: LoopChecks | None = None,
        guard: Guard | None = None,
        capture: TrainingCapture | None = None,
    ):
        self.shifted, self.collate = shifted, loader.collate_fn
        self._checks, self._guard, self._capture = checks, guard or Guard(), capture
        self._batch: dict[str, Any] = {}
        self.micro_batches: list[MicroBatch] = []
        self._current: MicroBatch | None = None
        stream = is_stream(loader) and row_id_column is not None
        dataset = IndexedStream(loader.dataset, str(row_id_column)) if stream else IndexedDataset(loader.dataset)
        patches.replace(loader, dataset=dataset, collate_fn=IndexedCollator(self.collate))
        patches.hook(
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after_forward),
        )

    def take(self) -> list[MicroBatch]:
        """Return the micro-batches since the last call."""
        taken, self.micro_batches = self.micro_batches, []
        return taken

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        row_indices = kwargs.pop(ROW_KEY, None)
        self._current, self._batch = None, kwargs
        if row_indices is not None and module.training and self._guard.error is None:
            with self._guard():
                kind = None if self._checks is None else self._checks.loss.kind
                tokens = divisor(kind, kwargs.get("num_items_in_batch"), kwargs.get("labels"), self.shifted)
                self._current = MicroBatch(row_indices, tokens)
                if self._capture is not None:
                    compared = self._checks is not None and self._checks.active
                    self._current.captured = self._capture.begin(row_indices.numel(), compared)
                self.micro_batches.append(self._current)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        micro, batch, self._current, self._batch = self._current, self._batch, None, {}
        if self._capture is not None:
            self._capture.end()
        if micro is not None and hasattr(output, "get"):
            with self._guard():
                self._record_output(micro, batch, output)

    def _record_output(self, micro: MicroBatch, batch: dict[str, Any], output: Any) -> None:
        loss, log_likelihoods = output.get("loss"), output.get("log_probs")
        if isinstance(log_likelihoods, Tensor) and log_likelihoods.requires_grad:  # TRL's models use these
            log_likelihoods.register_hook(micro.record_token_gradients)
        elif isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda gradient: setattr(micro, "loss_gradient", gradient.detach()))
        if self._checks is not None:
            self._checks.output(micro, batch, output, len(self.micro_batches))
