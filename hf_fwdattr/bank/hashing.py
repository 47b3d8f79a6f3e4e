"""Hashes of rows, salted for one bank, so that a dataset can be compared with it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QueryError


__all__ = ["content_hash", "longest_row", "row_hash", "row_hashes"]

_READ = 1000  # rows whose tokens are read together


def row_hash(tokens: Sequence[int] | Tensor, salt: bytes = b"") -> bytes:
    """Return the 128-bit hash of a row's token ids, keyed by the bank's salt (16 bytes)."""
    data = torch.as_tensor(tokens, dtype=torch.int64).cpu().numpy().astype("<i8").tobytes()
    return hashlib.blake2b(data, digest_size=16, key=salt).digest()


def content_hash(batch: Mapping[str, Any], salt: bytes = b"") -> bytes:
    """Return the 128-bit hash of a row without tokens, from its tensors by name, type, shape and value.

    `batch` holds that row alone, so that a dataset is compared with a bank by
    `bank.check_rows(content_hash(collate([row]), bank.salt) for row in dataset)`.
    """
    if isinstance(batch.get("input_ids"), Tensor):  # tokens that the collator made
        return row_hash(batch["input_ids"].reshape(-1), salt)
    digest = hashlib.blake2b(digest_size=16, key=salt)
    for name in sorted(key for key, value in batch.items() if isinstance(value, Tensor)):
        tensor = batch[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return digest.digest()


def row_hashes(dataset: Any, salt: bytes) -> Iterator[bytes] | None:
    """Return hashes of a dataset's rows in order, from their `input_ids` without padding; None if it has none.

    Only the needed columns of a `datasets.Dataset` are read.

    Raises:
        QueryError: a row of a stream has no `input_ids`.
    """
    if not hasattr(dataset, "__len__"):
        return _hash_stream(dataset, salt)
    names = getattr(dataset, "column_names", None)
    if names is None:
        return _hash_rows(dataset, salt) if hasattr(dataset[0], "keys") and "input_ids" in dataset[0] else None
    return _hash_columns(dataset, salt) if "input_ids" in names else None


def longest_row(dataset: Any) -> int:
    """Return the number of tokens of the longest row, padding counted; 0 where rows have no `input_ids`."""
    names = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__") or not len(dataset):
        return 0
    if names is not None and hasattr(dataset, "with_format"):
        if "input_ids" not in names:
            return 0
        plain = dataset.with_format(None).select_columns(["input_ids"])
        return max(
            len(ids) for start in range(0, len(plain), _READ) for ids in plain[start : start + _READ]["input_ids"]
        )
    if not hasattr(dataset[0], "keys") or "input_ids" not in dataset[0]:
        return 0
    return max(len(dataset[index]["input_ids"]) for index in range(len(dataset)))


def _hash_stream(dataset: Any, salt: bytes) -> Iterator[bytes]:
    for index, row in enumerate(dataset):
        if "input_ids" not in row:
            raise QueryError(f"row {index} of the dataset has no 'input_ids'. Pass the tokenized training set")
        yield row_hash(_unpadded(row["input_ids"], row.get("attention_mask")), salt)


def _hash_rows(dataset: Any, salt: bytes) -> Iterator[bytes]:
    for index in range(len(dataset)):
        row = dataset[index]
        yield row_hash(_unpadded(row["input_ids"], row.get("attention_mask")), salt)


def _hash_columns(dataset: Any, salt: bytes) -> Iterator[bytes]:
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
