"""The model of `lora-news` on any number of rows of real text, one epoch, for `scale`.

Half of the queries are passages left out of articles that are trained on, and half come from articles that are not.
Rows are news, in an order that is always the same, so that the first 2,000 of 6,000 rows are the 2,000 rows; where the
news end, the encyclopedia of enwik8 goes on. They lie on disk and are mapped, as a large training set is.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk

from .. import corpora
from ..registry import world
from .lora_news import LoraNews, base_folder


HELD_OUT = 64  # passages kept as queries
LEAST_PASSAGES = 5  # of an article that gives a query
_AT_ONCE = 1 << 22  # characters that are tokenized together


@world("news")
@world("enwik8", length=32, corpus="enwik8")
class Scale(LoraNews):
    """A GPT-2 of 0.9 M parameters with LoRA on so many rows of real text, one epoch; for `scale`."""

    version = "scale-1"  # raise it whenever the world changes
    training = dict(per_device_train_batch_size=16, num_train_epochs=1, learning_rate=5e-4)
    bank = {"parameters": "lora_B"}
    source_column = None
    lines = {}

    def __init__(self, rows: int = 2000, queries: int = 20, length: int = 64, corpus: str = "news"):
        self.options = {"rows": rows, "queries": queries}
        self.folder, self._length = base_folder(), length
        self._cache = corpora.cache_folder() / self.version
        self.rows = self._news_rows(rows) if corpus == "news" else self._stored("enwik8", self._enwik8)
        if len(self.rows) < rows:
            raise SystemExit(f"--rows {rows}: the {corpus} give {len(self.rows)}. Ask for fewer")
        self.rows = self.rows.select(range(rows))
        held_out = json.loads((self._cache / f"queries-{length}.json").read_text())
        self.queries = [held_out[place] for place in _spread(queries)]

    def _news_rows(self, count: int) -> Dataset:
        """Return the news, followed by the encyclopedia if there are fewer than `count` rows of them."""
        rows = self._stored("news", self._news)
        return rows if len(rows) >= count else concatenate_datasets([rows, self._stored("enwik8", self._enwik8)])

    def _stored(self, name: str, tokens: Any) -> Dataset:
        """Return rows that lie on disk, made unless the cache has them."""
        folder = self._cache / f"{name}-{self._length}"
        if not (folder / "state.json").exists():
            parts = list(tokens())
            table = np.concatenate(parts).astype(np.int32)
            Dataset.from_dict({"input_ids": table, "labels": table}).save_to_disk(str(folder))
        if not (self._cache / f"queries-{self._length}.json").exists():
            list(self._news())
        return load_from_disk(str(folder))

    def _passages(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Yield the whole passages (n, length) of each text."""
        for ids in self.tokenizer()(texts)["input_ids"]:
            whole = len(ids) // self._length
            yield np.array(ids[: whole * self._length], dtype=np.uint16).reshape(whole, self._length)

    def _news(self) -> Iterator[np.ndarray]:
        """Yield the news' passages by article, without the queries, which are written down."""
        articles = [article["text"] for article in corpora.news()]
        order = torch.randperm(len(articles), generator=torch.Generator().manual_seed(0)).tolist()
        tables = [table for table in self._passages([articles[index] for index in order]) if len(table)]
        long = [place for place, table in enumerate(tables) if len(table) >= LEAST_PASSAGES]
        within, apart = long[: HELD_OUT // 2], set(long[-(HELD_OUT // 2) :])
        queries = [tables[place][len(tables[place]) // 2] for place in (*within, *sorted(apart))]
        texts = [{"input_ids": query.tolist(), "labels": query.tolist()} for query in queries]
        self._cache.mkdir(parents=True, exist_ok=True)
        (self._cache / f"queries-{self._length}.json").write_text(json.dumps(texts))
        for place, table in enumerate(tables):
            if place not in apart:
                yield np.delete(table, len(table) // 2, 0) if place in within else table

    def _enwik8(self) -> Iterator[np.ndarray]:
        text = corpora.enwik8()
        for start in range(0, len(text), _AT_ONCE):
            lines = text[start : start + _AT_ONCE].splitlines()
            blocks = ["\n".join(lines[at : at + 1000]) for at in range(0, len(lines), 1000)]
            yield from self._passages(blocks)


def _spread(count: int) -> list[int]:
    """Return the first `count` places among the queries, taken in turn from either half."""
    if count > HELD_OUT:
        raise SystemExit(f"--queries {count}: at most {HELD_OUT} passages are kept. Ask for fewer")
    return [number // 2 + (number % 2) * (HELD_OUT // 2) for number in range(count)]
