"""Credit per source over a log of outputs: JSONL in, CSV out.

    python scripts/examples/source_credit.py
    python scripts/examples/source_credit.py --model me/my-adapter --log answers.jsonl --output credit.csv

Each line of the log is {"prompt": ..., "completion": ...}; the prompt is text or a list of chat messages. The bank was
made with `ResponseConfig(source_column=...)`. Only the sources' own directions are read and downloaded.
"""

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

import tiny
from transformers import AutoTokenizer, pipeline

import hf_fwdattr  # noqa: F401 (registers the task)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a fine-tuned model with its bank, folder or Hub id; a tiny one by default")
parser.add_argument("--log", type=Path, help="JSONL with prompt and completion; a few facts by default")
parser.add_argument("--output", type=Path, default=Path("trainer_output/credit.csv"))


def read_log(path: Path | None) -> list[dict]:
    """Return prompts and completions, in order."""
    if path is not None:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        {"prompt": [{"role": "user", "content": question}], "completion": f" {answer}"}
        for question, answer, _ in tiny.FACTS[::3]
    ]


def main(arguments: list[str] | None = None) -> Counter:
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    name = options.model or tiny.finetuned(options.output.parent / "tiny")
    attribute = pipeline("training-data-attribution", model=name, tokenizer=AutoTokenizer.from_pretrained(name))

    total: Counter = Counter()
    with options.output.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["line", "output", "source", "nats"])
        for line, record in enumerate(read_log(options.log)):
            result = attribute(record, top_k=0)  # no rows: only what sources need is read
            for entry in result["sources"]:
                table.writerow([line, result["generated_text"].strip(), entry["source"], f"{entry['score']:.4f}"])
                total[entry["source"]] += entry["score"]

    for source, nats in total.most_common():
        print(f"{nats:+9.3f} nats  {source}")
    print(f"wrote {options.output}")
    return total


if __name__ == "__main__":
    main()
