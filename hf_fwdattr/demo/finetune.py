"""The fine-tune whose rows are attributed: LoRA with the real Trainer, and the response callback beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class FineTuneSettings:
    """LoRA and the Trainer's arguments. Everything else keeps the Trainer's own defaults."""

    rank: int = 16
    epochs: float = 15
    batch_size: int = 16
    learning_rate: float = 5e-3
    seed: int = 0

    def changed(self, **values: Any) -> "FineTuneSettings":
        """A copy with other values; None leaves a value as it is."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


class Bar(TrainerCallback):
    """One progress bar with time left for the whole run, in place of the Trainer's own bar and log lines."""

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
    """Rows as the Trainer wants them: `input_ids` and equal `labels`, cut to `longest` tokens, beside text and source.

    Every row ends with the end-of-text token, so that the model learns where a row stops.
    """
    end = [tokenizer.eos_token_id]
    ids = [tokenizer(text, truncation=True, max_length=longest - 1)["input_ids"] + end for text in texts]
    columns: dict[str, Any] = {"input_ids": ids, "labels": ids, "text": list(texts)}
    return Dataset.from_dict(columns | ({"source": list(sources)} if sources is not None else {}))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or Hub id, with a padding token."""
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
        callbacks: Such as `ResponseCallback`, which leaves its bank in `output/fwdattr`.
        bar: Text of the progress bar; None for none.
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
        data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[*([Bar(bar)] if bar else []), *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(output))
    return trainer
