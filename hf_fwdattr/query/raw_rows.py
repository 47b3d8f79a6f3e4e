"""Training rows as their owner has them (messages, prompt and completion, text), tokenized as the training did.

How it did is found by comparison: usual ways of tokenizing are tried on a row, and the bank's hash of it picks one.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ..bank.hashing import row_hash
from ..bank.schema import Manifest
from ..errors import QueryError


__all__ = ["hash_raw_rows", "is_raw"]

Tokens = list[int]
_COLUMNS = ("messages", "conversations", "prompt", "text", "content", "sentence")


def is_raw(row: Any) -> bool:
    """Return whether a row has no tokens, but text that may become some."""
    return isinstance(row, Mapping) and "input_ids" not in row and _content(row) is not None


def hash_raw_rows(
    rows: Iterable[Any], expected: Sequence[bytes], manifest: Manifest, salt: bytes, tokenizer: Any
) -> Iterator[bytes]:
    """Yield the hash of each row's tokens; of a row that no way makes the bank's, the one of the first way.

    Args:
        expected: the bank's hashes of the same rows.

    Raises:
        QueryError: no way of tokenizing gives the tokens that the bank's first row has.
    """
    ways = _ways(manifest.dataset.longest)
    for index, (row, stored) in enumerate(zip(rows, expected, strict=True)):
        content = _content(row)
        matches = (way for way in ways if _hash(way, content, row, tokenizer, salt) == stored)
        way = None if content is None else next(matches, None)
        if way is not None:
            ways = [way, *(other for other in ways if other is not way)]
            yield stored
            continue
        if index == 0:
            raise QueryError(
                f"dataset: its rows have no 'input_ids' but {', '.join(map(repr, row))}, and no usual way of "
                "tokenizing (chat template, prompt with completion, text, with or without the end token, cut to "
                f"{manifest.dataset.longest} tokens) makes the tokens of the bank's row. Either it is another dataset "
                "or another order, or it was tokenized otherwise. Pass the tokenized training set, or "
                "verify_dataset=False to take rows by their position"
            )
        yield b"\0" * 16 if content is None else _hash(ways[0], content, row, tokenizer, salt) or b"\0" * 16


def _content(row: Mapping[str, Any]) -> Any:
    """Return a row's messages or text; of prompt and completion both joined."""
    name = next((name for name in _COLUMNS if row.get(name)), None)
    if name != "prompt":
        return None if name is None else row[name]
    prompt, completion = row["prompt"], row.get("completion")
    if completion is None or type(prompt) is not type(completion):
        return prompt
    return prompt + completion


Way = Callable[[Any, Mapping[str, Any], Any], Tokens]


def _ways(longest: int) -> list[Way]:
    """Return ways of tokenizing: with the end token or not, special tokens or not, cut at the end or the start."""
    cuts = [slice(None), slice(longest), slice(-longest, None)] if longest else [slice(None)]
    return [_way(*how) for how in product(cuts, (True, False), (True, False))]


def _way(cut: slice, ends: bool, special: bool) -> Way:
    def tokens(content: Any, row: Mapping[str, Any], tokenizer: Any) -> Tokens:
        if not isinstance(content, str):
            ids = _chat(content, row, tokenizer)
            end = tokenizer.eos_token_id
            return ([*ids, end] if not ends and end is not None else ids)[cut]
        end_text = tokenizer.eos_token or ""
        text = content + end_text if ends and not content.endswith(end_text) else content
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])[cut]

    return tokens


def _chat(messages: Any, row: Mapping[str, Any], tokenizer: Any) -> Tokens:
    if messages and "from" in messages[0]:
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles.get(m["from"], m["from"]), "content": m["value"]} for m in messages]
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    more = row.get("chat_template_kwargs") or {}
    return list(tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, **more)["input_ids"])


def _hash(way: Way, content: Any, row: Mapping[str, Any], tokenizer: Any, salt: bytes) -> bytes | None:
    try:
        return row_hash(way(content, row, tokenizer), salt)
    except (ValueError, TypeError, KeyError, AttributeError):  # no template, or messages of another form
        return None
