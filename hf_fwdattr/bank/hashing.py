"""The training rows as the passes read them: batches in a fixed order, each row with its position in the dataset."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QueryError


_READ = 1000  # rows whose tokens are read together


def row_hash(tokens: Sequence[int] | Tensor, salt: bytes = b"") -> bytes:
    """128-bit hash of a row's token ids, keyed by the bank's salt (16 bytes)."""
    data = torch.as_tensor(tokens, dtype=torch.int64).cpu().numpy().astype("<i8").tobytes()
    return hashlib.blake2b(data, digest_size=16, key=salt).digest()


def content_hash(batch: Mapping[str, Any], salt: bytes = b"") -> bytes:
    """128-bit hash of a row that has no tokens, from a batch of it alone: its tensors by name, type, shape and value.

    `bank.check_rows(content_hash(collate([row]), bank.salt) for row in dataset)` compares a dataset with a bank.
    """
    if isinstance(batch.get("input_ids"), Tensor):  # tokens that the collator made: what they are is what counts
        return row_hash(batch["input_ids"].reshape(-1), salt)
    digest = hashlib.blake2b(digest_size=16, key=salt)
    for name in sorted(key for key, value in batch.items() if isinstance(value, Tensor)):
        tensor = batch[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return digest.digest()


def row_hashes(dataset: Any, salt: bytes) -> Iterator[bytes] | None:
    """Hashes of the rows of a dataset in order, from their `input_ids` without padding; None if it has none.

    Of a `datasets.Dataset` only the columns that are needed are read.
    """
    if not hasattr(dataset, "__len__"):
        return _streamed(dataset, salt)
    names = getattr(dataset, "column_names", None)
    if names is None:
        return _hashed(dataset, salt) if hasattr(dataset[0], "keys") and "input_ids" in dataset[0] else None
    return _hashed_columns(dataset, salt) if "input_ids" in names else None


def _streamed(dataset: Any, salt: bytes) -> Iterator[bytes]:
    for at, row in enumerate(dataset):
        if "input_ids" not in row:
            raise QueryError(f"row {at} of the dataset has no 'input_ids'; pass the tokenized training set")
        yield row_hash(_unpadded(row["input_ids"], row.get("attention_mask")), salt)


def _hashed(dataset: Any, salt: bytes) -> Iterator[bytes]:
    for index in range(len(dataset)):
        row = dataset[index]
        yield row_hash(_unpadded(row["input_ids"], row.get("attention_mask")), salt)


def _hashed_columns(dataset: Any, salt: bytes) -> Iterator[bytes]:
    columns = [name for name in ("input_ids", "attention_mask") if name in dataset.column_names]
    plain = dataset.with_format(None).select_columns(columns)
    for start in range(0, len(plain), _READ):
        part = plain[start : start + _READ]
        masks = part.get("attention_mask", [None] * len(part["input_ids"]))
        for tokens, mask in zip(part["input_ids"], masks, strict=True):
            yield row_hash(_unpadded(tokens, mask), salt)


def _unpadded(tokens: Any, mask: Any) -> Tensor:
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    return ids if mask is None else ids[torch.as_tensor(mask).bool()]
