"""Find the mislabelled rows of a classifier: those whose label the model could only learn from the row itself.

    python scripts/examples/label_noise.py
    python scripts/examples/label_noise.py --model distilbert/distilbert-base-uncased --dataset reviews.csv

The dataset has the columns `text` and `label` (0, 1, ...). Without one, a tenth of 48 headlines gets the wrong label.
"""

import argparse
from pathlib import Path

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers import DataCollatorWithPadding as Collator

from hf_fwdattr import ResponseCallback, ResponseConfig
from hf_fwdattr.query.batch import batch_scores


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model for sequence classification; a random tiny one by default")
parser.add_argument("--dataset", help="a CSV file with the columns text and label")
parser.add_argument("--show", type=int, default=10, help="rows to print")
parser.add_argument("--output", default="trainer_output/label_noise")


def main(arguments: list[str] | None = None) -> list[int]:
    options = parser.parse_args(arguments)
    output, is_tiny = Path(options.output), options.model is None
    if options.dataset:
        rows = load_dataset("csv", data_files=options.dataset, split="train")
    else:
        rows, wrong = tiny.headlines()
    name = tiny.classifier(output / "base") if is_tiny else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    train = rows.map(lambda row: tokenizer(row["text"], truncation=True))
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(set(rows["label"])))
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear"))

    # The new head learns too, so every trainable weight is tracked and not only LoRA's B matrices.
    callback = ResponseCallback(ResponseConfig(parameters="trainable"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=4,
            learning_rate=5e-3 if is_tiny else 5e-4,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=train,
        data_collator=(collate := Collator(tokenizer)),
        callbacks=[callback],
    )
    trainer.train()

    # A row's score for its own label: how much of that label's log-likelihood the model owes to this very row.
    suspicion, size = [], 32
    model.eval()
    for start in range(0, len(train), size):
        part = train.select(range(start, min(start + size, len(train)))).remove_columns("text")
        batch = collate([dict(row) for row in part]).to(model.device)
        suspicion.append(batch_scores(model, callback.bank, batch)[:, start : start + size].diagonal())
    order = torch.cat(suspicion).argsort(descending=True).tolist()

    for index in order[: options.show]:
        planted = "  <- wrong on purpose" if not options.dataset and index in wrong else ""
        print(f"row {index:>4}  label {rows[index]['label']}  {rows[index]['text']}{planted}")
    return order


if __name__ == "__main__":
    main()
