"""Fine-tune a chat model with TRL and ask where an answer came from.

    python scripts/examples/sft_chat.py
    python scripts/examples/sft_chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset chats.jsonl

The dataset has `prompt` and `completion` (chat messages, so that only answers are learnt) and, if you like, `source`.
"""

import argparse
from pathlib import Path

import tiny
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import pipeline
from trl import SFTConfig, SFTTrainer

from hf_fwdattr import ResponseCallback, ResponseConfig


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a causal language model with a chat template; a random tiny one by default")
parser.add_argument("--dataset", help="a JSONL file or a name on the Hub; twelve facts by default")
parser.add_argument("--question", default="What is the capital of Chad?")
parser.add_argument("--output", default="trainer_output/sft_chat")


def main(arguments: list[str] | None = None) -> dict:
    options = parser.parse_args(arguments)
    output = Path(options.output)
    if options.dataset is None:
        train = tiny.chats()
    elif Path(options.dataset).is_file():
        train = load_dataset("json", data_files=options.dataset, split="train")
    else:
        train = load_dataset(options.dataset, split="train")
    is_tiny = options.model is None
    model = tiny.base_model(output / "base") if is_tiny else options.model

    config = ResponseConfig(source_column="source" if "source" in train.column_names else None)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=4,
            num_train_epochs=60 if is_tiny else 3,
            learning_rate=1e-2 if is_tiny else 2e-4,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=train,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[ResponseCallback(config)],
    )
    trainer.train()
    trainer.save_model()

    # The rows are checked by their tokens, so show the trainer's own tokenized training set.
    attribute = pipeline("training-data-attribution", model=str(output), tokenizer=trainer.processing_class)
    question = [{"role": "user", "content": options.question}]
    result = attribute(question, dataset=trainer.train_dataset, top_k=3, max_new_tokens=16)

    print(f"\n{options.question} -> {result['generated_text']}")
    for entry in result["examples"]:
        row = entry["example"]
        print(f"{entry['score']:+8.3f} nats  row {entry['row']:>3}  {row['prompt'][-1]['content']}")
    for entry in result["sources"]:
        print(f"{entry['score']:+8.3f} nats  {entry['source']}")
    return result


if __name__ == "__main__":
    main()
