"""The proof by retraining: fine-tune again without the rows that a method names, and see which answers are lost."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .asking import Answer
from .finetune import FineTuneSettings, fine_tune, load_tokenizer


RANDOM = "random rows"


@dataclass(frozen=True)
class Removal:
    """What is left of the answers after a fine-tune without the rows that a method named first.

    Attributes:
        removed: Number of rows left out, all at once.
        asked: Number of answers.
        kept: How many of them the model still gives, word for word.
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
    """One fine-tune per method without the row that it ranks first for each answer, and one without random rows.

    Of questions only correct answers are looked at. Everything else about the fine-tune is as it was, seed included.
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
        kept = sum(_says(model, tokenizer, answer) == answer.text for answer in answers)
        lines.append(Removal(method, len(rows), len(answers), kept, float((after - before).mean())))
    return lines


def _retrained(
    base: str, train: Dataset, settings: FineTuneSettings, without: set[int], bar: str | None
) -> PreTrainedModel:
    """The model after the same fine-tune on the other rows."""
    rest = train.select([row for row in range(len(train)) if row not in without])
    with tempfile.TemporaryDirectory() as folder:
        return fine_tune(base, rest, Path(folder), settings, bar=bar).model.eval()


@torch.no_grad()
def _likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[Answer]
) -> torch.Tensor:
    """(answers,) log-likelihood of every answer after its prompt, in nats."""
    values = []
    for answer in answers:
        prompt = tokenizer(answer.prompt)["input_ids"]
        said = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + said], device=model.device)
        logs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        values.append(logs.gather(1, ids[0, len(prompt) :, None]).sum().cpu())
    return torch.stack(values)


@torch.no_grad()
def _says(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """What the model now says to the prompt, in as many tokens as it took before, an end of text aside."""
    asked = tokenizer(answer.prompt, return_tensors="pt").to(model.device)
    text = model.generate(**asked, max_new_tokens=len(answer.tokens), do_sample=False)
    return tokenizer.decode(text[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
