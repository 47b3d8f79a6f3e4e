"""Training rows as their owner has them (messages, prompt and completion, text), tokenized as the training did.

How it did is found by comparison: usual ways of tokenizing are tried on a row, and the bank's hashes pick one. TRL's
`SFTTrainer` renders chats by the template, with their tools; joins prompt and completion; ends texts with the end
token; cuts at the start or the end; leaves out rows of which nothing would be learnt; and may shuffle the rest.
"""

import importlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..bank.hashing import row_hash
from ..bank.schema import Manifest
from ..errors import MismatchError, QueryError


__all__ = ["RawRows", "is_raw"]

_COLUMNS = ("prompt", "messages", "conversations", "text", "content", "sentence")  # looked at first
_MISSES = 64  # rows without a match on which every way is tried; a trial takes a millisecond or so
_ROLES = {"human": "user", "gpt": "assistant"}


def is_raw(row: Any) -> bool:
    """Return whether a row has no tokens, but text or messages that may become some."""
    return isinstance(row, Mapping) and "input_ids" not in row and any(name in row for name in _columns(row))


@dataclass(frozen=True)
class _Way:
    """A way from a row to its tokens.

    Attributes:
        column: of the text or the messages; of a prompt its completion is part.
        template: chat template, where it is not the tokenizer's own.
        as_text: a chat is rendered first, and then tokenized as any text, as by a `formatting_func`.
        ends: the end token is added, unless the text has it.
        special: with the tokens that the tokenizer puts around every text.
        renamed: roles of ShareGPT are renamed to those of chats.
    """

    column: str
    template: str | None = None
    as_text: bool = False
    ends: bool = False
    special: bool = True
    renamed: bool = False

    def tokens(self, row: Mapping[str, Any], tokenizer: Any) -> list[int] | None:
        """Return a row's tokens; None where the way does not fit it."""
        content = _content(row, self.column)
        if not isinstance(content, str) and not _is_chat(content):
            return None
        if isinstance(content, str):
            return None if self.as_text or self.renamed or self.template else self._of_text(content, tokenizer)
        if self.as_text:
            return self._of_text(self._render(content, row, tokenizer, tokenize=False), tokenizer)
        ids = list(self._render(content, row, tokenizer, return_dict=True)["input_ids"])
        return [*ids, tokenizer.eos_token_id] if self.ends and tokenizer.eos_token_id is not None else ids

    def _of_text(self, text: str, tokenizer: Any) -> list[int]:
        end = tokenizer.eos_token or ""
        text = text + end if self.ends and not text.endswith(end) else text
        return list(tokenizer(text, add_special_tokens=self.special)["input_ids"])

    def _render(self, messages: Any, row: Mapping[str, Any], tokenizer: Any, **how: Any) -> Any:
        if "from" in messages[0]:
            names = _ROLES if self.renamed else {}
            messages = [{"role": names.get(m["from"], m["from"]), "content": m["value"]} for m in messages]
        tools = row.get("tools")
        more = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        more |= {"chat_template": self.template} | dict(row.get("chat_template_kwargs") or {})
        return tokenizer.apply_chat_template(messages, **more, **how)


class RawRows:
    """Finds the bank's hashes of rows that are not tokenized.

    Args:
        manifest (`Manifest`): the bank's; it knows to how many tokens rows were cut.
        salt (`bytes`): the key of its hashes.
        tokenizer: the one that the training used.
    """

    def __init__(self, manifest: Manifest, salt: bytes, tokenizer: Any):
        self._longest, self._salt, self._tokenizer = manifest.dataset.longest, salt, tokenizer
        longest = self._longest
        self._cuts = [slice(None), slice(longest), slice(-longest, None)] if longest else [slice(None)]
        self._proven: list[tuple[_Way, slice]] = []  # the latest first
        self._misses = 0

    def hashes(self, rows: Iterable[Any], stored: Collection[bytes]) -> Iterator[bytes]:
        """Yield the hash of each row's tokens; of a row that no way makes one of the bank, the one of a usual way.

        Args:
            stored: all of the bank's hashes.

        Raises:
            QueryError: no way of tokenizing makes a row of the bank from the first of these.
        """
        for row in rows:
            found = self._match(row, stored)
            if found is None and not self._proven:
                raise self._unknown(row)
            yield found or self._guess(row)

    def order(self, rows: Any, stored: Sequence[bytes]) -> list[int] | None:
        """Return which of a dataset's rows is each of the bank's; None if they are the same rows in the same order.

        Rows may be in another order, and some may not be the bank's. Rows of the same tokens are taken in their order.

        Raises:
            MismatchError: a row of the bank is not in the dataset.
            QueryError: no way of tokenizing makes a row of the bank.
        """
        wanted, indices = Counter(stored), defaultdict[bytes, deque[int]](deque)
        spare = len(rows) - len(stored)
        for index in range(len(rows)):
            row = rows[index]
            found = self._match(row, wanted)
            if found is not None and wanted[found] > len(indices[found]):
                indices[found].append(index)
                continue
            spare -= 1
            if spare < 0 and not self._proven:
                raise self._unknown(row)
            if spare < 0:
                raise MismatchError(
                    f"row {index} of the dataset is not the row that was trained on (token hash "
                    f"{(found or self._guess(row)).hex()}, in no such row of the bank). Pass the training set"
                )
        order = [indices[key].popleft() for key in stored]
        return None if order == list(range(len(rows))) else order

    def _match(self, row: Any, wanted: Collection[bytes]) -> bytes | None:
        """Return a hash among those wanted that some way makes of a row."""
        for way, cut in self._proven:
            if (found := self._hash(way, cut, row)) in wanted:
                return found
        if self._misses >= _MISSES:
            return None
        for way in _ways(row, self._tokenizer):
            for cut in self._cuts:
                if (found := self._hash(way, cut, row)) in wanted:
                    self._proven.insert(0, (way, cut))
                    return found
        self._misses += 1
        return None

    def _hash(self, way: _Way, cut: slice, row: Mapping[str, Any]) -> bytes | None:
        try:
            ids = way.tokens(row, self._tokenizer)
        except Exception:  # no template, or messages of another form; templates refuse in classes of their own
            return None
        return None if ids is None else row_hash(ids[cut], self._salt)

    def _guess(self, row: Mapping[str, Any]) -> bytes:
        found = self._hash(*self._proven[0], row) if self._proven else None
        return found or b"\0" * 16

    def _unknown(self, row: Mapping[str, Any]) -> QueryError:
        return QueryError(
            f"dataset: its rows have no 'input_ids' but {', '.join(map(repr, row))}, and no usual way of tokenizing "
            "(chat template, prompt with completion, text, with or without the end token, cut to "
            f"{self._longest} tokens) makes a row of the bank. Either it is another dataset, or it was tokenized "
            "otherwise, as by a formatting_func. Pass the tokenized training set (trainer.train_dataset), or "
            "verify_dataset=False to take rows by their position"
        )


def _columns(row: Mapping[str, Any]) -> list[str]:
    """Return the names of columns with a text or messages, likely ones first."""
    names = [*_COLUMNS, *(name for name in row if name not in (*_COLUMNS, "completion", "tools"))]
    return [name for name in names if (isinstance(row.get(name), str) and row[name]) or _is_chat(row.get(name))]


def _is_chat(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _content(row: Mapping[str, Any], column: str) -> Any:
    """Return a row's messages or text; of prompt and completion both joined."""
    content: Any = row.get(column)
    completion: Any = row.get("completion")
    both = column == "prompt" and content is not None and type(content) is type(completion)
    return content + completion if both else content


def _ways(row: Any, tokenizer: Any) -> Iterator[_Way]:
    """Yield ways of tokenizing a row, the likeliest first; TRL's template for training is looked up last."""
    if not isinstance(row, Mapping):
        return
    columns, ends_and_special = _columns(row), list(product((True, False), (True, False)))
    chats = [name for name in columns if not isinstance(row[name], str)]
    for column in columns:
        if column not in chats:
            yield from (_Way(column, ends=ends, special=special) for ends, special in ends_and_special)
            continue
        for renamed in (False, True):
            yield from (_Way(column, ends=ends, renamed=renamed) for ends in (False, True))
            for ends, special in ends_and_special:
                yield _Way(column, as_text=True, ends=ends, special=special, renamed=renamed)
    template = _training_template(tokenizer) if chats else None
    for column in chats if template is not None else ():
        yield _Way(column, template=template)


def _training_template(tokenizer: Any) -> str | None:
    """Return the template by which TRL renders chats where only the assistant's tokens are learnt, if it has one."""
    try:
        return importlib.import_module("trl.chat_template_utils").get_training_chat_template(tokenizer)
    except Exception:  # trl is not there, or knows no template for this tokenizer
        return None
