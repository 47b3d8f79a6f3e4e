"""The rows' text, where a bank keeps it: UTF-8 in safetensors, read row by row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BankError
from .schema import ShardFile
from .tensors import open_shard


__all__ = ["read_texts", "text_shards"]


def text_shards(texts: Iterable[str], shard_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield shards of texts: `text`, the bytes of all, and `offsets` (n + 1,), where each begins and the last ends.

    Args:
        shard_size (`int`): bytes of text after which a shard is closed.
    """
    letters, ends = bytearray(), [0]
    for text in texts:
        letters += text.encode("utf-8", "replace")
        ends.append(len(letters))
        if len(letters) >= shard_size:
            yield _shard(letters, ends)
            letters, ends = bytearray(), [0]
    if len(ends) > 1:
        yield _shard(letters, ends)


def _shard(letters: bytearray, ends: list[int]) -> dict[str, Tensor]:
    text = torch.frombuffer(letters, dtype=torch.uint8) if letters else torch.zeros(0, dtype=torch.uint8)
    return {"offsets": torch.tensor(ends), "text": text}


def read_texts(shards: Iterable[tuple[ShardFile, Callable[[], Path]]], row_indices: Sequence[int]) -> list[str]:
    """Read texts of rows.

    Args:
        shards: each with the function that fetches it, which is called only if one of the rows is in it.

    Raises:
        BankError: offsets outside the text, or bytes that are not UTF-8.
    """
    texts: dict[int, str] = {}
    for file, fetch in shards:
        in_shard = sorted({row for row in row_indices if file.first <= row < file.first + file.lines})
        if in_shard:
            texts |= zip(in_shard, _read(fetch(), file, in_shard), strict=True)
    return [texts[row] for row in row_indices]


def _read(path: Path, file: ShardFile, row_indices: Sequence[int]) -> Iterator[str]:
    with open_shard(path) as shard:
        offsets, letters = shard.get_tensor("offsets"), shard.get_slice("text")
        ordered = bool((offsets[1:] >= offsets[:-1]).all())
        if not ordered or int(offsets[0]) != 0 or int(offsets[-1]) != letters.get_shape()[0]:
            raise BankError(f"{file.name}: its offsets do not divide its text. Download the bank again")
        for row in row_indices:
            start, end = offsets[row - file.first : row - file.first + 2].tolist()
            try:
                yield bytes(letters[start:end].tolist()).decode()
            except UnicodeDecodeError as error:
                raise BankError(
                    f"{file.name}: the text of row {row} is not UTF-8 ({error.reason}). Download the bank again"
                ) from error
