"""The base model of the demo: a small GPT-2, trained on the spot, that knows the kinds of sentences, not the facts."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, set_seed


__all__ = ["BaseSettings", "build_base"]

END = "<|endoftext|>"


@dataclass(frozen=True)
class BaseSettings:
    """Size and training of the base model: about 0.7 M parameters, a minute on two cores."""

    vocabulary: int = 1024
    context: int = 128
    width: int = 128
    layers: int = 3
    heads: int = 4
    epochs: int = 18
    batch_size: int = 32
    learning_rate: float = 3e-3
    prose_share: float = 0.125
    seed: int = 0


def build_base(
    lessons: Sequence[str],
    prose: Sequence[str],
    folder: Path,
    settings: BaseSettings | None = None,
    quiet: bool = False,
) -> None:
    """Train a byte-level tokenizer and a GPT-2 and save both in `folder`, ready for `from_pretrained`.

    Args:
        lessons: Sentences that are read in every epoch.
        prose: Sentences of which a random `prose_share` is read in every epoch.
    """
    settings = settings or BaseSettings()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer([*lessons, *prose], folder, settings.vocabulary)
    end = tokenizer.eos_token_id
    set_seed(settings.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=settings.vocabulary, n_positions=settings.context, n_embd=settings.width,
            n_layer=settings.layers, n_head=settings.heads, bos_token_id=end, eos_token_id=end, pad_token_id=end,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    lesson_ids, prose_ids = (
        [[*ids[: settings.context - 1], end] for ids in tokenizer(list(texts))["input_ids"]]
        for texts in (lessons, prose)
    )
    _train(model, lesson_ids, prose_ids, settings, quiet)
    model.save_pretrained(folder)


def _tokenizer(texts: Sequence[str], folder: Path, vocabulary: int) -> GPT2TokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train(
    model: GPT2LMHeadModel, lessons: list[list[int]], prose: list[list[int]], settings: BaseSettings, quiet: bool
) -> None:
    """Train in a plain loop: one text per row, from its first token on, like the rows of the fine-tune."""
    rng, batches = random.Random(settings.seed), []
    for _ in range(settings.epochs):
        texts = lessons + rng.sample(prose, round(settings.prose_share * len(prose)))
        batches += _batches(texts, settings.batch_size, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup, total = 50, len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0) * max(0.02, (1 + math.cos(math.pi * step / total)) / 2)
    )
    model.train()
    for batch in tqdm(batches, desc="training a base model", disable=quiet, unit="step"):
        ids, labels = _pad(batch)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _batches(texts: list[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """Return the batches of one epoch in random order, each of texts of similar length, for little padding."""
    order = rng.sample(texts, len(texts))
    batches = []
    for start in range(0, len(order), 16 * size):
        window = sorted(order[start : start + 16 * size], key=len)
        batches += [window[i : i + size] for i in range(0, len(window), size)]
    rng.shuffle(batches)
    return batches


def _pad(batch: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both (rows, longest); labels are -100 beyond the end of a row."""
    longest = max(map(len, batch))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch])
    return ids, labels
