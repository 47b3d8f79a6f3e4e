"""The rows' text, where a bank was asked to keep it: UTF-8 in safetensors, read row by row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import BankError
from .schema import File


def packed(texts: Iterable[str], most: int) -> Iterator[dict[str, Tensor]]:
    """Shards of texts: `text`, the bytes of all, and `offsets` (n + 1,), where each begins and the last ends.

    Args:
        most (`int`): bytes of text after which a shard is closed.
    """
    letters, ends = bytearray(), [0]
    for text in texts:
        letters += text.encode("utf-8", "replace")
        ends.append(len(letters))
        if len(letters) >= most:
            yield _shard(letters, ends)
            letters, ends = bytearray(), [0]
    if len(ends) > 1:
        yield _shard(letters, ends)


def _shard(letters: bytearray, ends: list[int]) -> dict[str, Tensor]:
    text = torch.frombuffer(letters, dtype=torch.uint8) if letters else torch.zeros(0, dtype=torch.uint8)
    return {"offsets": torch.tensor(ends), "text": text}


def read_texts(shards: Iterable[tuple[File, Callable[[], Path]]], places: Sequence[int]) -> list[str]:
    """Texts of rows by their positions.

    Args:
        shards: each with what brings it here, which is called only if a row is in it.

    Raises:
        BankError: offsets that lead nowhere, or bytes that are no UTF-8.
    """
    found: dict[int, str] = {}
    for file, path in shards:
        here = sorted({place for place in places if file.first <= place < file.first + file.lines})
        if here:
            found |= zip(here, _read(path(), file, here), strict=True)
    return [found[place] for place in places]


def _read(path: Path, file: File, places: Sequence[int]) -> Iterator[str]:
    with safe_open(path, framework="pt") as shard:
        offsets, letters = shard.get_tensor("offsets"), shard.get_slice("text")
        ordered = bool((offsets[1:] >= offsets[:-1]).all())
        if not ordered or int(offsets[0]) != 0 or int(offsets[-1]) != letters.get_shape()[0]:
            raise BankError(f"{file.name}: its offsets do not divide its text; download or build the bank again")
        for place in places:
            start, end = offsets[place - file.first : place - file.first + 2].tolist()
            try:
                yield bytes(letters[start:end].tolist()).decode()
            except UnicodeDecodeError as error:
                raise BankError(f"{file.name}: the text of row {place} is no UTF-8 ({error.reason})") from error
