"""A world of seconds, for trying a protocol or a method: a random GPT-2 of two layers and texts in five dialects."""

import tempfile
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from ..registry import world
from ..world import LanguageModelWorld


WORDS, LENGTH = 32, 12


@world("tiny")
class Tiny(LanguageModelWorld):
    """A random GPT-2 of two layers with LoRA, on texts of five sources with words of their own; needs no download."""

    version = "tiny-2"
    training = dict(per_device_train_batch_size=4, num_train_epochs=3, learning_rate=2e-3)
    bank = {"parameters": "lora", "batch_size": 8}
    source_column = "source"
    lines = {
        "bank, exact, three segments": ("bank", {"directions": "exact"}),
        "bank, k = 8": ("bank", {"directions": 8}),
        "two stages": ("two-stages", {"budget": 24}),
        "gradient dot product": ("gradient-dot", {}),
        "BM25": ("bm25", {}),
    }
    sources = [f"source {number}" for number in range(5)]

    def __init__(self, rows: int = 30, queries: int = 6):
        self.options = {"rows": rows, "queries": queries}
        self.rows = Dataset.from_list(self._dialects(rows, seed=1))
        self.queries = self._dialects(queries, seed=2)
        self.row_sources = torch.tensor([self.sources.index(name) for name in self.rows["source"]])

    def _dialects(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Return texts in which each source has three words of its own, between words that all of them use."""
        generator, found = torch.Generator().manual_seed(seed), []
        for index in range(count):
            source = index % len(self.sources)
            common = torch.randint(1, 12, (LENGTH,), generator=generator)
            own = 12 + 3 * source + torch.randint(0, 3, (LENGTH,), generator=generator)
            tokens = torch.where(torch.rand(LENGTH, generator=generator) < 0.5, own, common).tolist()
            found.append({"input_ids": tokens, "labels": tokens, "source": self.sources[source]})
        return found

    @cached_property
    def _base(self) -> tempfile.TemporaryDirectory:
        folder = tempfile.TemporaryDirectory(prefix="fwdattr-tiny-")
        set_seed(0)
        config = GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder.name)
        return folder

    def model(self) -> PeftModel:
        set_seed(0)
        config = LoraConfig(r=2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        return get_peft_model(GPT2LMHeadModel.from_pretrained(self._base.name), config)

    def texts(self, rows: Any) -> list[str]:
        return [" ".join(f"word{token}" for token in row["input_ids"]) for row in rows]
