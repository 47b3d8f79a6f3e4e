"""The training rows as the passes read them: batches in a fixed order, with the index of each row in the dataset."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QueryError, UnsupportedError
from ..models.likelihood import IGNORED


__all__ = ["TrainingRows", "uniforms"]

_WINDOW = 16  # batches that are sorted by length together, so that little padding is computed


class TrainingRows:
    """A map-style dataset with the collator it was trained with.

    Args:
        dataset (`Sequence`): `len` and `[i]`; a `datasets.Dataset` or a list of dictionaries.
        collate (`Callable`): list of features -> batch of tensors with `labels`.
        batch_size (`int`): rows per batch.
        device (`torch.device`): device of the batches.
        context_length (`int`, *optional*): longest row that the model reads, in tokens.
        classes (`int`, *optional*): labels go from 0 to below this.

    Raises:
        QueryError: an empty dataset; while reading, a row that is too long or has impossible labels.
        UnsupportedError: a dataset without length, a collator that packs rows or is random.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        device: torch.device | str = "cpu",
        context_length: int | None = None,
        classes: int | None = None,
    ):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UnsupportedError(
                f"dataset: {type(dataset).__name__} has no length or no random access. Attribution reads rows by "
                "their index. Pass a map-style dataset"
            )
        if len(dataset) == 0:
            raise QueryError("the dataset is empty: there is no row to attribute to. Pass the training set")
        self.dataset, self.collate, self.batch_size = dataset, collate, batch_size
        self.device, self.context_length, self.classes = device, context_length, classes
        indices = list(range(min(batch_size, len(dataset))))
        first, second = self.batch(indices), self.batch(indices)
        for key, value in first.items():
            if isinstance(value, Tensor) and not torch.equal(value, second[key]):
                raise UnsupportedError(
                    f"the collator returns another {key!r} each time (random masking or augmentation), so a row has "
                    "no single gradient. Use a deterministic collator"
                )

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, indices: Sequence[int] | None = None) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield row indices (rows,) and their batch on the device, covering `indices` (all rows by default) once."""
        order = list(range(len(self))) if indices is None else list(indices)
        step = _WINDOW * self.batch_size
        for start in range(0, len(order), step):
            window = order[start : start + step]
            features = dict(zip(window, self._features(window), strict=True))
            window.sort(key=lambda i: -_length(features[i]))
            for at in range(0, len(window), self.batch_size):
                chosen = window[at : at + self.batch_size]
                yield torch.tensor(chosen), self._collated(chosen, [features[i] for i in chosen])

    def count(self, rows: int) -> int:
        """Return the number of batches of so many rows."""
        windows, rest = divmod(rows, _WINDOW * self.batch_size)
        return windows * _WINDOW + -(-rest // self.batch_size)

    def _features(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[i] for i in indices]

    def lengths(self, indices: list[int]) -> list[int]:
        """Return the numbers of tokens of rows; 0 for a row without tokens."""
        return [_length(feature) for feature in self._features(indices)]

    def batch(self, indices: list[int]) -> dict[str, Any]:
        """Return the rows at these indices as one batch."""
        return self._collated(indices, self._features(indices))

    def _collated(self, indices: list[int], features: list[Any]) -> dict[str, Any]:
        batch = dict(self.collate([dict(f) if isinstance(f, dict) else f for f in features]))
        tokens = batch.get("input_ids")
        if self.context_length is not None and isinstance(tokens, Tensor) and tokens.shape[-1] > self.context_length:
            longest = max(indices, key=lambda i: _length(features[indices.index(i)]))
            raise QueryError(
                f"row {longest} has {tokens.shape[-1]} tokens and the model reads at most {self.context_length}. "
                "Truncate the dataset as it was truncated for training"
            )
        if not isinstance(batch.get("labels"), Tensor):
            raise QueryError(
                f"the collator's batches have {sorted(batch)} but no 'labels', so no loss is defined. Use the "
                "collator of the training"
            )
        self._check_labels(indices, batch["labels"])
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _check_labels(self, indices: list[int], labels: Tensor) -> None:
        if len(labels) != len(indices):
            raise UnsupportedError(
                f"the collator makes {len(labels)} out of {len(indices)} rows: packed rows cannot be told apart. Pack "
                "the dataset itself, or train without packing"
            )
        wrong = (labels < 0) & (labels != IGNORED)
        if self.classes is not None:
            wrong |= labels >= self.classes
        if bool(wrong.any()):
            row = int(wrong.reshape(len(indices), -1).any(1).nonzero()[0])
            raise QueryError(
                f"row {indices[row]} has the label {int(labels[row][wrong[row]].flatten()[0])}. Labels are -100 or "
                f"from 0 to {'the number of classes' if self.classes is None else self.classes - 1}"
            )


def _length(feature: Any) -> int:
    tokens = feature.get("input_ids") if hasattr(feature, "get") else None
    return len(tokens) if tokens is not None else 0


def uniforms(indices: Tensor, positions: int, *key: int) -> Tensor:
    """Return random numbers (rows, positions) in [0, 1) that depend only on each row's index and on `key`."""
    drawn = []
    for index in indices.tolist():
        name = " ".join(map(str, (*key, index))).encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")
        drawn.append(torch.rand(positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return torch.stack(drawn)
