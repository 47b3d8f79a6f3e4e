"""Ask a model, attribute what it says, and find out how often the rows that taught it are named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from .baseline import TextSimilarity
from .facts import Question


SHARD_PATTERN, PROMPT_AND_ANSWER, ANSWER_ALONE = "hf_fwdattr", "BM25, prompt and answer", "BM25, answer alone"


@dataclass(frozen=True)
class Named:
    """A row that a method names: its position, text and source, and the method's score (nats, or BM25).

    `token_scores` has one value per output token, and is empty where the method has none. `teaches` says whether the
    row is known to teach the answer; None where nothing is known.
    """

    row: int
    text: str
    source: str | None
    score: float
    token_scores: list[float] = field(default_factory=list)
    teaches: bool | None = None


@dataclass(frozen=True)
class Answer:
    """One prompt, what the model said, and what is behind it.

    Attributes:
        tokens: The output, token by token.
        proponents: Rows that made the output likelier, most helpful first.
        opponents: Rows that made it less likely, most harmful first.
        sources: (source, score in nats), highest first.
        alike: Per text similarity, the rows that it ranks first.
        question: What is known about the right answer and its rows; None for a free prompt.
        correct: Whether the model said the expected answer; None for a free prompt.
    """

    prompt: str
    text: str
    tokens: list[str]
    proponents: list[Named]
    opponents: list[Named]
    sources: list[tuple[str, float]]
    alike: dict[str, list[Named]]
    question: Question | None = None
    correct: bool | None = None

    def rankings(self) -> dict[str, list[Named]]:
        """Best rows of every method, ours first."""
        return {SHARD_PATTERN: self.proponents} | self.alike

    def found(self, method: str, within: int) -> bool:
        """Whether a row that teaches the answer is among the method's first `within`."""
        return any(named.teaches for named in self.rankings()[method][:within])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = asdict(self) | {"sources": [list(line) for line in self.sources]}
        if self.question is not None:
            values["question"]["rows"] = sorted(self.question.rows)
        return values


def is_correct(text: str, answer: str) -> bool:
    """Whether a generated text begins with the expected answer as a whole: "Kigali." for Kigali, not "Kigalia."."""
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
    """Put every prompt to the attribution pipeline and compare what it names with text similarity.

    Args:
        attribute: The pipeline `training-data-attribution`, or anything that answers as it does.
        train: The training set, with the columns `text` and, where there are sources, `source`.
        top_k: Rows that are named per method.
    """
    texts = train["text"][:]
    alike = {
        PROMPT_AND_ANSWER: TextSimilarity(texts, stopwords=True),
        ANSWER_ALONE: TextSimilarity(texts, stopwords=False),
    }
    answers = []
    for prompt in tqdm(prompts, desc="asking and attributing", disable=quiet, unit="prompt"):
        text = prompt.prompt if isinstance(prompt, Question) else prompt
        result = attribute(text, dataset=train, top_k=top_k, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(_answer(prompt, result, train, alike, top_k))
    return answers


def _answer(
    prompt: str | Question, result: Mapping[str, Any], train: Dataset, alike: Mapping[str, TextSimilarity], top_k: int
) -> Answer:
    question = prompt if isinstance(prompt, Question) else None
    sources = train["source"] if "source" in train.column_names else None

    def named(row: int, score: float, token_scores: Sequence[float] = ()) -> Named:
        teaches = row in question.rows if question else None
        source = sources[row] if sources is not None else None
        return Named(row, train[row]["text"], source, score, list(token_scores), teaches)

    ours = [named(line["row"], line["score"], line["token_scores"]) for line in result["examples"]]
    said, asked = result["generated_text"], question.prompt if question else str(prompt)
    lists = {}
    for method, similarity in alike.items():
        query = f"{asked} {said}" if method == PROMPT_AND_ANSWER else said
        scores = similarity.scores(query)
        lists[method] = [named(int(row), float(scores[row])) for row in similarity.ranking(query)[:top_k]]
    return Answer(
        prompt=asked,
        text=said,
        tokens=list(result["tokens"]),
        proponents=[line for line in ours if line.score > 0][:top_k],
        opponents=[line for line in reversed(ours) if line.score < 0][:top_k],
        sources=[(line["source"], line["score"]) for line in result["sources"]],
        alike=lists,
        question=question,
        correct=is_correct(said, question.answer) if question else None,
    )


@dataclass(frozen=True)
class Recall:
    """Of the questions in one wording that were answered correctly: how often a teaching row is named.

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
    """One line per wording, and one over all of them if there are several.

    Only correct answers are counted: a wrong answer was not learned from the rows that teach the right one.
    """
    known = [answer for answer in answers if answer.question is not None]
    wordings = list(dict.fromkeys(answer.question.wording for answer in known if answer.question))
    groups = {name: [a for a in known if a.question and a.question.wording == name] for name in wordings}
    if len(groups) > 1:
        groups["all"] = known
    return [_recall(name, group, k) for name, group in groups.items()]


def _recall(wording: str, group: Sequence[Answer], k: int) -> Recall:
    right = [answer for answer in group if answer.correct]
    methods = list(right[0].rankings()) if right else []

    def share(method: str, within: int) -> float:
        return sum(answer.found(method, within) for answer in right) / len(right)

    return Recall(
        wording=wording,
        asked=len(group),
        correct=len(right),
        first={method: share(method, 1) for method in methods},
        top={method: share(method, k) for method in methods},
    )
