"""Models of known shapes with random weights, where only time matters; they need no download."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from ..registry import world
from ..world import LanguageModelWorld


@world("smollm2-shape")
class SmolLM2Shape(LanguageModelWorld):
    """Random weights in the shape of SmolLM2-135M, LoRA of rank 8 on q and v, rows of 64 random tokens."""

    version = "smollm2-shape-1"
    training = dict(per_device_train_batch_size=2, num_train_epochs=3, learning_rate=5e-4)
    bank = {"parameters": "lora", "batch_size": 6}

    def __init__(self, rows: int = 72):
        self.options = {"rows": rows}
        tokens = torch.randint(1, 49152, (rows, 64), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows = self.queries = Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    def model(self) -> PeftModel:
        set_seed(0)
        sizes: dict[str, Any] = dict(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora)
