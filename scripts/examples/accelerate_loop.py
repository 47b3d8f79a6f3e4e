"""A training loop of your own over Accelerate: three calls of ResponseRecorder make the bank.

    python scripts/examples/accelerate_loop.py
    accelerate launch scripts/examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M

Under several processes every one of them makes the same calls.
"""

import argparse
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup

from hf_fwdattr import ResponseBank, ResponseConfig, ResponseRecorder


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a causal language model; a random tiny one by default")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--output", type=Path, default=Path("trainer_output/accelerate_loop"))


def main(arguments: list[str] | None = None) -> ResponseBank:
    options = parser.parse_args(arguments)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    if options.model is None and accelerator.is_main_process:
        tiny.base_model(options.output / "base")
    accelerator.wait_for_everyone()
    name = options.model or str(options.output / "base")
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = tiny.token_rows(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(name)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    # The loader gives what the model takes; the recorder gets the whole rows, with their sources.
    columns = rows.select_columns(["input_ids", "labels"])
    loader = DataLoader(columns, batch_size=3, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    steps = options.epochs * len(loader) // 2  # optimizer steps; each takes two batches
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    recorder = ResponseRecorder(  # 1. when everything is prepared
        ResponseConfig(source_column="source"), accelerator=accelerator, model=model, optimizer=optimizer,
        dataloader=loader, steps=steps, dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    model.train()
    for _ in range(options.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                recorder.step()  # 2. right after every optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    accelerator.unwrap_model(model).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    bank = recorder.finish(options.output / "fwdattr")  # 3. when training is done

    accelerator.print(f"{len(bank)} rows, {bank.manifest.directions} directions, in {bank.folder}")
    return bank


if __name__ == "__main__":
    main()
