"""Fine-tuning with LoRA and the Trainer, and again without the rows that a method names."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from .ask import Answer


__all__ = ["RANDOM", "FineTuneSettings", "Removal", "check_by_removal", "fine_tune", "load_tokenizer", "tokenized"]

RANDOM = "random rows"


@dataclass(frozen=True)
class FineTuneSettings:
    """Settings of LoRA and the Trainer. Everything else keeps the Trainer's defaults."""

    rank: int = 16
    epochs: float = 15
    batch_size: int = 16
    learning_rate: float = 5e-3
    seed: int = 0

    def changed(self, **values: Any) -> "FineTuneSettings":
        """Return a copy with other values; None leaves a value as it is."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


class _ProgressBar(TrainerCallback):
    """A progress bar for the whole run, in place of the Trainer's own bar and log lines."""

    def __init__(self, text: str):
        self.text = text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.text, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def tokenized(
    texts: Sequence[str], sources: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Dataset:
    """Tokenize rows for the Trainer: `input_ids` and equal `labels` of at most `longest` tokens, text and source.

    Every row ends with the end-of-text token, so that the model learns where a row ends.
    """
    end = [tokenizer.eos_token_id]
    ids = [tokenizer(text, truncation=True, max_length=longest - 1)["input_ids"] + end for text in texts]
    columns: dict[str, Any] = {"input_ids": ids, "labels": ids, "text": list(texts)}
    return Dataset.from_dict(columns | ({"source": list(sources)} if sources is not None else {}))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fine_tune(
    base: str,
    train: Dataset,
    output: Path,
    settings: FineTuneSettings | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    bar: str | None = None,
) -> Trainer:
    """Fine-tune a LoRA adapter on every linear layer of `base`, and save it with its tokenizer in `output`.

    Args:
        base: Folder or Hub id of a causal language model.
        train: Rows with `input_ids` and `labels`.
        callbacks: For example `ResponseCallback`, which writes its bank into `output/fwdattr`.
        bar: Title of the progress bar; None for no bar.
    """
    settings = settings or FineTuneSettings()
    tokenizer = load_tokenizer(base)
    # The base itself is frozen; only float32 keeps the small gradients of single rows.
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    arguments = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=settings.batch_size, num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate, seed=settings.seed, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    set_seed(settings.seed)  # the adapter's first weights are random, and the Trainer seeds only later
    lora = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.0, target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()), task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = Trainer(
        model=get_peft_model(model, lora), args=arguments, train_dataset=train, processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[*([_ProgressBar(bar)] if bar else []), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(output))
    return trainer


@dataclass(frozen=True)
class Removal:
    """Answers of a model that was fine-tuned without the rows that a method ranks first.

    Attributes:
        removed: Number of rows left out, all at once.
        asked: Number of answers before.
        kept: Number of answers that the model still gives, word for word.
        change: Mean change of an answer's log-likelihood, in nats.
    """

    method: str
    removed: int
    asked: int
    kept: int
    change: float


def check_by_removal(
    base: str, train: Dataset, settings: FineTuneSettings, answers: Sequence[Answer], quiet: bool = False
) -> list[Removal]:
    """Fine-tune once per method without the row that it ranks first for each answer, and once without random rows.

    Wrong answers to questions are left aside. Everything else about the fine-tune is the same, seed included.
    """
    answers = [answer for answer in answers if answer.correct is not False]
    if not answers:
        return []
    named = {
        method: {answer.rankings()[method][0].row for answer in answers if answer.rankings()[method]}
        for method in answers[0].rankings()
    }
    size = max(map(len, named.values()))
    named[RANDOM] = set(random.Random(settings.seed).sample(range(len(train)), size))
    tokenizer = load_tokenizer(base)
    before = _likelihoods(
        _retrained(base, train, settings, set(), None if quiet else "fine-tuning again on all rows"),
        tokenizer,
        answers,
    )
    lines = []
    for method, rows in named.items():
        model = _retrained(base, train, settings, rows, None if quiet else f"fine-tuning without the rows of {method}")
        after = _likelihoods(model, tokenizer, answers)
        kept = sum(_generate(model, tokenizer, answer) == answer.text for answer in answers)
        lines.append(Removal(method, len(rows), len(answers), kept, float((after - before).mean())))
    return lines


def _retrained(
    base: str, train: Dataset, settings: FineTuneSettings, without: set[int], bar: str | None
) -> PreTrainedModel:
    """Repeat the fine-tune on the other rows."""
    rest = train.select([row for row in range(len(train)) if row not in without])
    with tempfile.TemporaryDirectory() as folder:
        return fine_tune(base, rest, Path(folder), settings, bar=bar).model.eval()


@torch.no_grad()
def _likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer]
) -> torch.Tensor:
    """Compute the log-likelihood of every answer after its prompt: (answers,), in nats."""
    values = []
    for answer in answers:
        prompt = tokenizer(answer.prompt)["input_ids"]
        output = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + output], device=model.device)
        logs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        values.append(logs.gather(1, ids[0, len(prompt) :, None]).sum().cpu())
    return torch.stack(values)


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """Generate an answer to the prompt in as many tokens as before, without an end-of-text token."""
    prompt = tokenizer(answer.prompt, return_tensors="pt").to(model.device)
    text = model.generate(**prompt, max_new_tokens=len(answer.tokens), do_sample=False)
    return tokenizer.decode(text[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
