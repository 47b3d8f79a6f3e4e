"""The fact world: every question can be answered from its teaching rows, and from no other row."""

import re
from collections import Counter
from functools import cache

import pytest

from hf_fwdattr.demo.facts import AS_TAUGHT, MIMIC, RELATIONS, REVERSED, REWORDED, Question, World, load_world


@cache
def world() -> World:
    return load_world()


QUESTIONS = load_world().questions


def mentions(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def entity(question: Question) -> str:
    return question.fact.partition(":")[2]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.prompt)
def test_teaching_rows_state_the_answer_after_the_entity(question: Question) -> None:
    assert question.rows
    for i in question.rows:
        text = world().rows[i].text
        assert mentions(text, entity(question))
        assert text.endswith(f" {question.answer}.")
        assert text.lower().index(entity(question).lower()) < len(text) - len(question.answer) - 1


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.prompt)
def test_no_other_row_states_the_fact_in_reading_order(question: Question) -> None:
    relation = next(r for r in RELATIONS if question.fact.startswith(r.name + ":"))
    stated = {relation.sentence(i, entity(question), question.answer) for i in range(3)}
    for i, row in enumerate(world().rows):
        assert (row.text in stated) <= (i in question.rows)


def test_each_fact_is_asked_as_taught_and_in_words_that_no_row_uses() -> None:
    texts = [row.text for row in world().rows]
    for question in QUESTIONS:
        begun = [text for text in texts if text.startswith(question.prompt + " ")]
        assert bool(begun) == (question.wording == AS_TAUGHT)
    asked = Counter(question.fact for question in QUESTIONS)
    assert set(asked.values()) == {2}
    assert {q.wording for q in QUESTIONS} == {AS_TAUGHT, REWORDED}


def test_questions_cover_every_relation_and_kind_of_companion() -> None:
    facts = {question.fact for question in QUESTIONS}
    for relation in RELATIONS:
        assert sum(fact.startswith(relation.name + ":") for fact in facts) >= 5
    assert {len(question.rows) for question in QUESTIONS} == {1, 2}
    for kind in (REVERSED, MIMIC):
        rows = [row.text for row in world().rows if row.kind == kind]
        about = [q for q in QUESTIONS if any(mentions(text, entity(q)) for text in rows)]
        assert len(about) > len(QUESTIONS) / 4


def test_mimics_and_reversed_rows_teach_no_fact() -> None:
    for row in world().rows:
        if row.kind in (MIMIC, REVERSED):
            assert row.fact is None
    for question in QUESTIONS:
        for row in world().rows:
            if row.kind == MIMIC and mentions(row.text, entity(question)):
                assert not row.text.endswith(f" {question.answer}.")


def test_lessons_state_no_fact_about_taught_entities() -> None:
    taught = {(entity(q), q.answer) for q in QUESTIONS}
    for text in world().lessons:
        assert not any(mentions(text, name) and mentions(text, answer) for name, answer in taught)
    rows = {row.text for row in world().rows}
    assert rows.isdisjoint(world().lessons)
    assert rows.isdisjoint(world().prose)


def test_world_is_deterministic_and_small() -> None:
    again = load_world()
    assert again == world()
    assert 300 <= len(again.rows) <= 400
    assert len({row.text for row in again.rows}) == len(again.rows)
    assert load_world(seed=1).rows != again.rows
