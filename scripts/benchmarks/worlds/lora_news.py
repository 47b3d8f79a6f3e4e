"""A small GPT-2, trained on the spot and fine-tuned with LoRA on 40 news articles.

The base model has read State of the Union addresses (public domain). A source is a news article, its rows are twelve
passages of it, and its query is a thirteenth. Made in about three minutes on two cores and kept in the cache folder.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from .. import corpora
from ..registry import world
from ..world import LanguageModelWorld


CONTEXT = 64
ROWS_PER_SOURCE = 12
SOURCES = 40
PRETRAINING = 3_000_000  # tokens
BASE = "lora-world-2"  # name of the base model in the cache


@world("lora-news")
class LoraNews(LanguageModelWorld):
    """A GPT-2 of 0.9 M parameters with LoRA on 480 passages of 40 news articles; a query is a held-out passage."""

    version = BASE  # raise it whenever the world changes
    training = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=5e-4)
    source_column = "source"
    lines = {
        "bank, exact, three segments": ("bank", {"directions": "exact"}),
        "bank, exact, gradients after training": ("bank", {"directions": "exact", "capture": "after"}),
        "bank, exact, five segments, after training": (
            "bank",
            {"directions": "exact", "segments": 5, "capture": "after"},
        ),
        "bank, k = 256": ("bank", {"directions": 256}),
        "bank, k = 128": ("bank", {"directions": 128}),
        "bank, k = 64": ("bank", {"directions": 64}),
        "bank, exact, one segment": ("bank", {"directions": "exact", "segments": 1}),
        "bank, exact, five segments": ("bank", {"directions": "exact", "segments": 5}),
        "bank, exact, six curvature samples a row": ("bank", {"directions": "exact", "curvature_samples": 6 * 480}),
        "bank, exact, trajectory average": ("bank", {"directions": "exact", "averaging": "trajectory"}),
        "bank, k = 128, trajectory average": ("bank", {"directions": 128, "averaging": "trajectory"}),
        "gradient dot product": ("gradient-dot", {}),
        "BM25": ("bm25", {}),
    }

    def __init__(self):
        self.folder = base_folder()
        tokenizer, rows, queries = self.tokenizer(), [], []
        articles = _articles(tokenizer)
        for source, article in enumerate(articles):
            passages = _passages(tokenizer, article["text"], ROWS_PER_SOURCE + 1, source)
            queries.append(passages.pop(ROWS_PER_SOURCE // 2))
            rows += passages
        self.rows, self.queries = Dataset.from_list(rows), queries
        self.row_sources, self.sources = torch.tensor(self.rows["source"]), [str(number) for number in range(SOURCES)]

    def tokenizer(self) -> GPT2TokenizerFast:
        return GPT2TokenizerFast.from_pretrained(self.folder)

    def model(self) -> PeftModel:
        """Return the base model with a fresh adapter: r = 8 on every projection."""
        set_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        return get_peft_model(GPT2LMHeadModel.from_pretrained(self.folder), config)

    def texts(self, rows: Any) -> list[str]:
        tokenizer = self.tokenizer()
        return [tokenizer.decode(row["input_ids"]) for row in rows]


def base_folder() -> Path:
    """Return the folder of the pretrained base model and its tokenizer, made unless the cache has them."""
    folder = corpora.cache_folder() / BASE
    if not (folder / "config.json").exists():
        texts = [address["text"] for address in corpora.sotu()]
        # Addresses of all times in turn, so that three million tokens see every period.
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        _pretrain(_tokenizer([texts[i] for i in order], folder), [texts[i] for i in order], folder)
    return folder


def _tokenizer(texts: list[str], folder: Path) -> GPT2TokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def _pretrain(tokenizer: GPT2TokenizerFast, texts: list[str], folder: Path) -> None:
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]][:PRETRAINING]
    passages = torch.tensor(stream[: len(stream) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    set_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=CONTEXT, n_embd=128, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "pretraining"), per_device_train_batch_size=64, num_train_epochs=1, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=50, logging_steps=100, save_strategy="no", report_to=[], use_cpu=True,
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": passages.tolist(), "labels": passages.tolist()})
    model = GPT2LMHeadModel(config)
    Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=default_data_collator).train()
    model.save_pretrained(folder)


def _passages(tokenizer: GPT2TokenizerFast, text: str, count: int, source: int) -> list[dict]:
    tokens = tokenizer(text)["input_ids"]
    passages = [tokens[start : start + CONTEXT] for start in range(0, count * CONTEXT, CONTEXT)]
    return [{"input_ids": passage, "labels": passage, "source": source} for passage in passages]


def _articles(tokenizer: GPT2TokenizerFast) -> list[dict]:
    """Return the first articles that are long enough, taken from the publishers in turn."""
    needed = (ROWS_PER_SOURCE + 1) * CONTEXT
    shelves: dict[str, list[dict]] = {}
    for article in corpora.news():
        shelf = shelves.setdefault(article["publisher"], [])
        if len(shelf) < SOURCES and len(tokenizer(article["text"])["input_ids"]) >= needed:
            shelf.append(article)
    turns = itertools.chain(*itertools.zip_longest(*(shelves[name] for name in sorted(shelves))))
    return [article for article in turns if article][:SOURCES]
