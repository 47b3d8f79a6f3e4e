"""SmolLM2-135M fine-tuned with LoRA on two thousand passages of nine publishers, and its bank: made once and kept.

    python scripts/smollm2_world.py [--rows 2000]

The rows are passages of news articles, 48 tokens each; queries are passages of 64 tokens of other articles. The better
part of an hour on one core; what stops on the way begins anew.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import corpora
import torch
from datasets import Dataset
from smollm2_news import adapted, arguments, reader
from transformers import DataCollatorForLanguageModeling, Trainer, pipeline

from hf_fwdattr import ResponseCallback, ResponseConfig


ROW, QUERY = 48, 64  # tokens
QUERIES = 5  # of each publisher


def passages(tokenizer, rows: int) -> tuple[Dataset, Dataset]:
    """`rows` training passages and `QUERIES` queries per publisher, in turn of publishers, of different articles."""
    shelves: dict[str, list[dict]] = defaultdict(list)
    queries: dict[str, list[dict]] = defaultdict(list)
    for article in corpora.news():
        publisher = article["publisher"]
        ids = tokenizer(f"{article['title']}. {article['text']}")["input_ids"]
        if len(queries[publisher]) < QUERIES and len(ids) >= QUERY:
            queries[publisher].append({"publisher": publisher, "input_ids": ids[:QUERY]})
            continue
        for at in range(0, len(ids) - ROW + 1, ROW):
            shelves[publisher].append({"publisher": publisher, "input_ids": ids[at : at + ROW]})
    found: list[dict] = []
    while len(found) < rows and any(shelves.values()):
        found += [shelf.pop(0) for _, shelf in sorted(shelves.items()) if shelf]
    asked = [query for _, shelf in sorted(queries.items()) for query in shelf]
    return Dataset.from_list(found[:rows]), Dataset.from_list(asked)


def world(rows: int):
    """The pipeline that reads the fine-tuned model, and its queries (token lists); built at the first call."""
    base = str(corpora.smollm2(corpora.cache_folder() / "smollm2-135m"))
    tokenizer = reader(base)
    train, asked = passages(tokenizer, rows)
    folder = corpora.cache_folder() / f"smollm2-world-{rows}"
    if not (folder / "fwdattr" / "bank.json").exists():
        fine_tune(base, tokenizer, train, folder)
    attribute = pipeline("training-data-attribution", model=str(folder), tokenizer=tokenizer, device="cpu")
    return attribute, [{"input_ids": ids, "labels": ids} for ids in asked["input_ids"]]


def fine_tune(base: str, tokenizer, train: Dataset, folder: Path) -> None:
    """One epoch and three passes, in bfloat16 where it pays."""
    config = ResponseConfig(source_column="publisher", segments=1, curvature_samples=600, memory_budget=14 << 30)
    trainer = Trainer(
        model=adapted(base), args=arguments(folder / "run", 1, per_device_train_batch_size=16, bf16=True),
        train_dataset=train, callbacks=[ResponseCallback(config)],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    started = time.time()
    attribute, queries = world(options.rows)
    manifest = attribute.bank.manifest
    share = manifest.predictor_explained_variance if manifest.error_projections else None
    print(f"{len(attribute.bank)} rows, {manifest.size} parameters, {len(queries)} queries")
    print(f"128 directions keep {manifest.explained_variance:.3f}, the first look {share}")
    print(f"{time.time() - started:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
