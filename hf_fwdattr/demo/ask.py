"""Questions to the pipeline and to text similarity, and how often either names the rows that teach the answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import bm25s
import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from .facts import Question


__all__ = [
    "ANSWER_ALONE",
    "ATTRIBUTION",
    "PROMPT_AND_ANSWER",
    "Answer",
    "NamedRow",
    "Recall",
    "TextSimilarity",
    "ask",
    "is_correct",
    "recall",
]

# The methods that are compared.
ATTRIBUTION, PROMPT_AND_ANSWER, ANSWER_ALONE = "hf_fwdattr", "BM25, prompt and answer", "BM25, answer alone"


class TextSimilarity:
    """BM25 (k1 1.5, b 0.75) between a text and every row; rows of equal score keep their order.

    Args:
        rows: The texts to rank.
        stopwords: Leave out English stop words. Right when the prompt is part of the text, where "the", "of" and "is"
            would reward rows of the same template; wrong for an answer alone, which may be one ("In", indium).
    """

    def __init__(self, rows: Sequence[str], stopwords: bool):
        self._stopwords = "en" if stopwords else None
        self._index = bm25s.BM25()
        self._index.index(self._words(rows), show_progress=False)
        self._size = len(rows)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return bm25s.tokenize(
            list(texts), stopwords=self._stopwords, token_pattern=r"(?u)[\w']+", return_ids=False, show_progress=False
        )

    def scores(self, text: str) -> np.ndarray:
        """Return the BM25 score of every row (rows,); all zero for a text without words."""
        words = self._words([text])[0]
        return self._index.get_scores(words) if words else np.zeros(self._size, dtype=np.float32)

    def ranking(self, text: str) -> np.ndarray:
        """Return the indices of the rows (rows,), most similar first."""
        return np.argsort(-self.scores(text), kind="stable")


@dataclass(frozen=True)
class NamedRow:
    """A row that a method names: its index, text and source, and the method's score (nats, or BM25).

    `token_scores` has one value per output token, and is empty for text similarity. `teaches` says whether the row
    teaches the answer; None for a free prompt.
    """

    row: int
    text: str
    source: str | None
    score: float
    token_scores: list[float] = field(default_factory=list)
    teaches: bool | None = None


@dataclass(frozen=True)
class Answer:
    """An answer of the model, and the rows and sources behind it.

    Attributes:
        tokens: The output, token by token.
        proponents: Rows that made the output likelier, most helpful first.
        opponents: Rows that made it less likely, most harmful first.
        sources: (source, score in nats), highest first.
        similar: The most similar rows per text similarity.
        question: The right answer and its rows; None for a free prompt.
        correct: Whether the model gave the right answer; None for a free prompt.
    """

    prompt: str
    text: str
    tokens: list[str]
    proponents: list[NamedRow]
    opponents: list[NamedRow]
    sources: list[tuple[str, float]]
    similar: dict[str, list[NamedRow]]
    question: Question | None = None
    correct: bool | None = None

    def rankings(self) -> dict[str, list[NamedRow]]:
        """Return the best rows of every method, attribution first."""
        return {ATTRIBUTION: self.proponents} | self.similar

    def names_teacher(self, method: str, within: int) -> bool:
        """Return whether a row that teaches the answer is among the method's first `within`."""
        return any(row.teaches for row in self.rankings()[method][:within])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        values = asdict(self) | {"sources": [list(line) for line in self.sources]}
        if self.question is not None:
            values["question"]["rows"] = sorted(self.question.rows)
        return values


def is_correct(text: str, answer: str) -> bool:
    """Return whether a text begins with the whole expected answer: "Kigali." for Kigali, not "Kigalia."."""
    text = text.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def ask(
    attribute: Callable[..., Any],
    prompts: Sequence[str | Question],
    train: Dataset,
    top_k: int = 5,
    max_new_tokens: int = 16,
    quiet: bool = False,
) -> list[Answer]:
    """Put every prompt to the attribution pipeline and to text similarity.

    Args:
        attribute: The pipeline `training-data-attribution`, or a function with the same results.
        train: The training set, with the column `text` and, optionally, `source`.
        top_k: Number of rows that each method names.
    """
    texts = train["text"][:]
    similarities = {
        PROMPT_AND_ANSWER: TextSimilarity(texts, stopwords=True),
        ANSWER_ALONE: TextSimilarity(texts, stopwords=False),
    }
    answers = []
    for prompt in tqdm(prompts, desc="asking and attributing", disable=quiet, unit="prompt"):
        text = prompt.prompt if isinstance(prompt, Question) else prompt
        result = attribute(text, dataset=train, top_k=top_k, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(_answer(prompt, result, train, similarities, top_k))
    return answers


def _answer(
    prompt: str | Question,
    result: Mapping[str, Any],
    train: Dataset,
    similarities: Mapping[str, TextSimilarity],
    top_k: int,
) -> Answer:
    question = prompt if isinstance(prompt, Question) else None
    sources = train["source"] if "source" in train.column_names else None

    def named(row: int, score: float, token_scores: Sequence[float] = ()) -> NamedRow:
        teaches = row in question.rows if question else None
        source = sources[row] if sources is not None else None
        return NamedRow(row, train[row]["text"], source, score, list(token_scores), teaches)

    rows = [named(line["row"], line["score"], line["token_scores"]) for line in result["examples"]]
    output, asked = result["generated_text"], question.prompt if question else str(prompt)
    similar = {}
    for method, similarity in similarities.items():
        text = f"{asked} {output}" if method == PROMPT_AND_ANSWER else output
        scores = similarity.scores(text)
        similar[method] = [named(int(row), float(scores[row])) for row in similarity.ranking(text)[:top_k]]
    return Answer(
        prompt=asked,
        text=output,
        tokens=list(result["tokens"]),
        proponents=[row for row in rows if row.score > 0][:top_k],
        opponents=[row for row in reversed(rows) if row.score < 0][:top_k],
        sources=[(line["source"], line["score"]) for line in result["sources"]],
        similar=similar,
        question=question,
        correct=is_correct(output, question.answer) if question else None,
    )


@dataclass(frozen=True)
class Recall:
    """Frequency with which a teaching row is named for the correctly answered questions in one wording.

    Attributes:
        asked, correct: Numbers of questions.
        first, top: Per method, the share of correct answers with a teaching row ranked first, or among the first k.
    """

    wording: str
    asked: int
    correct: int
    first: dict[str, float]
    top: dict[str, float]


def recall(answers: Sequence[Answer], k: int = 5) -> list[Recall]:
    """Compute one line per wording, and one over all of them if there are several.

    Only correct answers are counted: a wrong answer was not learned from the rows that teach the right one.
    """
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.question is not None:
            groups.setdefault(answer.question.wording, []).append(answer)
    if len(groups) > 1:
        groups["all"] = [answer for answer in answers if answer.question is not None]
    return [_recall(wording, group, k) for wording, group in groups.items()]


def _recall(wording: str, group: Sequence[Answer], k: int) -> Recall:
    correct = [answer for answer in group if answer.correct]
    methods = list(correct[0].rankings()) if correct else []

    def share(method: str, within: int) -> float:
        return sum(answer.names_teacher(method, within) for answer in correct) / len(correct)

    return Recall(
        wording=wording,
        asked=len(group),
        correct=len(correct),
        first={method: share(method, 1) for method in methods},
        top={method: share(method, k) for method in methods},
    )
