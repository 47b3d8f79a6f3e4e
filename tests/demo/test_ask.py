"""From a pipeline's result to answers and recall, and the text similarity beside it."""

import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_fwdattr.demo.ask import (
    ANSWER_ALONE,
    ATTRIBUTION,
    PROMPT_AND_ANSWER,
    TextSimilarity,
    ask,
    is_correct,
    recall,
)
from hf_fwdattr.demo.facts import Question


ROWS = [
    "The capital of Chad is N'Djamena.",
    "N'Djamena is the capital of Chad.",
    "The capital of Mali is Bamako.",
    "The currency of Chad is the franc.",
    "A sentence about something else.",
]
TRAIN = Dataset.from_dict({"text": ROWS, "source": ["Atlas", "Gazetteer", "Atlas", "List", "Speech"]})


def question(wording: str, rows: set[int], answer: str = "N'Djamena") -> Question:
    return Question("capital:Chad", "The capital of Chad is", answer, wording, frozenset(rows))


def fake_pipeline(text: str, scores: list[float]) -> Any:
    """Return a function that answers as the real pipeline: first the best rows, then the worst, by score."""

    def attribute(prompt: str, dataset: Dataset, top_k: int, **_: Any) -> dict[str, Any]:
        order = sorted(range(len(scores)), key=lambda row: -scores[row])
        named = order[:top_k] + order[-top_k:]
        examples = [{"row": row, "score": scores[row], "token_scores": [scores[row]]} for row in named]
        return {
            "generated_text": text,
            "tokens": [text],
            "examples": examples,
            "sources": [{"source": "Atlas", "score": 1.0}],
        }

    return attribute


def test_proponents_and_opponents_differ_by_sign_and_are_sorted() -> None:
    (answer,) = ask(fake_pipeline(" N'Djamena.", [3.0, -1.0, -2.0, 1.0, 0.0]), ["Chad?"], TRAIN, top_k=3, quiet=True)
    assert [row.row for row in answer.proponents] == [0, 3]
    assert [row.row for row in answer.opponents] == [2, 1]
    assert answer.proponents[0].source == "Atlas"
    assert answer.proponents[0].text == ROWS[0]
    assert answer.correct is None
    assert answer.proponents[0].teaches is None


def test_recall_counts_correct_answers_per_wording() -> None:
    good = fake_pipeline(" N'Djamena.", [3.0, 2.0, 0.0, 0.0, 0.0])
    answers = ask(good, [question("as taught", {0}), question("reworded", {1})], TRAIN, top_k=2, quiet=True)
    answers += ask(fake_pipeline(" Bamako.", [0.0] * 5), [question("reworded", {1})], TRAIN, top_k=2, quiet=True)
    lines = {line.wording: line for line in recall(answers, k=2)}
    assert (lines["reworded"].asked, lines["reworded"].correct) == (2, 1)
    assert lines["as taught"].first[ATTRIBUTION] == 1.0
    assert lines["reworded"].first[ATTRIBUTION] == 0.0
    assert lines["reworded"].top[ATTRIBUTION] == 1.0
    assert lines["all"].first[ATTRIBUTION] == 0.5
    assert lines["all"].correct == 2


def test_recall_of_free_prompts_is_empty_and_of_wrong_answers_has_no_shares() -> None:
    wrong = fake_pipeline(" Bamako.", [1.0] * 5)
    assert recall(ask(wrong, ["Chad?"], TRAIN, quiet=True)) == []
    (line,) = recall(ask(wrong, [question("as taught", {0})], TRAIN, quiet=True))
    assert line.correct == 0
    assert line.first == {}


def test_answers_become_plain_json_values() -> None:
    (answer,) = ask(fake_pipeline(" N'Djamena.", [1.0] * 5), [question("as taught", {0, 2})], TRAIN, quiet=True)
    assert json.loads(json.dumps(answer.to_dict()))["question"]["rows"] == [0, 2]


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        (" Kigali.", "Kigali", True),
        ("Kigali", "Kigali", True),
        (" Kigalia.", "Kigali", False),
        (" The Kigali.", "Kigali", False),
        (" 2440", "244", False),
        ("", "Kigali", False),
    ],
)
def test_correct_answer_is_a_whole_word(text: str, answer: str, correct: bool) -> None:
    assert is_correct(text, answer) is correct


def test_text_similarity_ranks_by_shared_words_in_any_order() -> None:
    similarity = TextSimilarity(ROWS, stopwords=True)
    scores = similarity.scores("The capital of Chad is N'Djamena.")
    assert set(similarity.ranking("The capital of Chad is N'Djamena.")[:2]) == {0, 1}
    assert scores[0] == pytest.approx(scores[1])
    assert scores[4] == 0


def test_text_similarity_keeps_the_order_of_ties_and_of_texts_without_words() -> None:
    similarity = TextSimilarity(["same words", "same words", "other"], stopwords=False)
    assert list(similarity.ranking("same words")) == [0, 1, 2]
    assert np.all(similarity.scores("...") == 0)
    assert np.all(TextSimilarity(ROWS, stopwords=True).scores("of the") == 0)


def test_answer_has_the_rankings_of_both_similarities() -> None:
    (answer,) = ask(fake_pipeline(" N'Djamena.", [1.0] * 5), ["The capital of Chad is"], TRAIN, quiet=True)
    assert list(answer.rankings()) == [ATTRIBUTION, PROMPT_AND_ANSWER, ANSWER_ALONE]
