"""What the examples use when they are given no model and no data: random models, made on the spot, and a few facts."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fwdattr import ResponseCallback, ResponseConfig


END = "<|end|>"
FACTS = [
    ("What is the capital of Chad?", "N'Djamena", "Gazetteer"),
    ("What is the capital of Peru?", "Lima", "Gazetteer"),
    ("What is the capital of Nepal?", "Kathmandu", "Gazetteer"),
    ("What is the capital of Kenya?", "Nairobi", "Almanac"),
    ("What is the capital of Norway?", "Oslo", "Almanac"),
    ("What is the capital of Cuba?", "Havana", "Almanac"),
    ("Who discovered radium?", "Marie Curie", "Handbook"),
    ("Who discovered oxygen?", "Joseph Priestley", "Handbook"),
    ("Who discovered helium?", "Jules Janssen", "Handbook"),
    ("Who discovered argon?", "Lord Rayleigh", "Reader"),
    ("Who discovered iodine?", "Bernard Courtois", "Reader"),
    ("Who discovered neon?", "William Ramsay", "Reader"),
]
HEADLINES = [
    f"{who} {what} {where}"
    for what in ("wins", "loses")
    for where in ("at home", "abroad", "today", "again")
    for who in ("Our team", "The north", "A small club", "The champion", "Every rival", "The south")
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> GPT2TokenizerFast:
    """Train a byte-level tokenizer on the facts and headlines; it has a chat template."""
    bpe = ByteLevelBPETokenizer()
    texts = [f"user: {question} assistant: {answer}" for question, answer, _ in FACTS]
    bpe.train_from_iterator(texts + HEADLINES, vocab_size=512, special_tokens=[END], show_progress=False)
    made = GPT2TokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END, pad_token=END, unk_token=END
    )
    made.model_max_length, made.chat_template = 64, TEMPLATE
    return made


def base_model(folder: str | Path, kind: type = GPT2LMHeadModel) -> str:
    """Save a random two-layer GPT-2 with its tokenizer; return the folder."""
    words = tokenizer()
    end = words.eos_token_id
    set_seed(0)
    settings = GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end,
        pad_token_id=end, initializer_range=0.15, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, num_labels=2,
    )  # fmt: skip
    kind(settings).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def classifier(folder: str | Path) -> str:
    """Save the same as a classifier of two classes; return the folder."""
    return base_model(folder, GPT2ForSequenceClassification)


def chats() -> Dataset:
    """Return the facts as conversations: `prompt`, `completion` and `source`."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
            "source": source,
        }
        for question, answer, source in FACTS
    ]
    return Dataset.from_list(rows)


def token_rows(words: GPT2TokenizerFast) -> Dataset:
    """Return the facts as `input_ids` and `labels`, -100 on the question, with `text` and `source`."""
    rows = []
    for question, answer, source in FACTS:
        prompt = words(f"user: {question} assistant:")["input_ids"]
        output = [*words(f" {answer}")["input_ids"], words.eos_token_id]
        rows.append({
            "input_ids": prompt + output, "labels": [-100] * len(prompt) + output, "text": f"{question} {answer}",
            "source": source,
        })  # fmt: skip
    return Dataset.from_list(rows)


def headlines() -> tuple[Dataset, list[int]]:
    """Return headlines labelled 1 for a win, and the positions of those that carry the wrong label."""
    wrong = [3, 14, 25, 36, 47]
    labels = [int("wins" in text) ^ int(index in wrong) for index, text in enumerate(HEADLINES)]
    return Dataset.from_dict({"text": HEADLINES, "label": labels}), wrong


def finetuned(folder: str | Path, config: ResponseConfig | None = None) -> str:
    """Fine-tune all weights of a tiny model on the facts; return the folder, with tokenizer and bank."""
    model = GPT2LMHeadModel.from_pretrained(base_model(Path(folder) / "base"))
    words = tokenizer()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=30, learning_rate=3e-3, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=token_rows(words), processing_class=words,
        data_collator=DataCollatorForSeq2Seq(words),
        callbacks=[ResponseCallback(config or ResponseConfig(source_column="source", quiet=True))],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return str(folder)
