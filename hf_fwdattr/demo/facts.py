"""The fact world of the demo: about 380 rows from named sources, and questions whose teaching rows are known.

How it is made. 28 countries and 26 chemical elements are *taught*: the model that is fine-tuned has met their names
("Ships from Chad arrived in the harbour.") and no fact about them, and it has read every kind of sentence about 88
other countries and 42 other elements. A fact, such as the capital of Chad, is taught by one row of a reference work,
and half of the facts by a second row in other words in another work. Around them stand rows that look alike and teach
something else:

* the same sentence about another entity, and other facts about the same entity;
* the words of the question without the answer ("The capital of Chad was discussed at length in the assembly.");
* the same words turned round ("N'Djamena is the capital of Chad."), for a third of the facts. A causal language model
  that reads "B is A" does not learn to continue "A is" with B (Berglund et al. 2023, arXiv 2309.12288), so such a row
  is **not** counted as teaching the fact, although any measure of common words takes one for the other. (Tried here:
  of the 53 facts that are also turned round, a model that read only the turned-round rows answers none, and one that
  read only the others answers 49.)
* sentences of old speeches, some of which mention a country that is asked about.

Every question is asked twice: in the wording of the row that teaches it, and in a wording that no row
uses. Nothing about the world is chosen by looking at what any attribution method ranks.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from .relations import RELATIONS, SMALL_TALK, Relation, capitalised


TEACHES, PARAPHRASE, REVERSED, MIMIC, SPEECH = "teaches", "paraphrase", "reversed", "mimic", "speech"
AS_TAUGHT, REWORDED = "as taught", "reworded"
ASKED = 5  # every fifth fact is asked; companions repeat every six facts, so every combination of them is met as often


@dataclass(frozen=True)
class Row:
    """One training row. `fact` is the id of the fact that it teaches ("capital:Chad"), None if it teaches none."""

    text: str
    source: str
    kind: str
    fact: str | None = None


@dataclass(frozen=True)
class Question:
    """A prompt, the expected answer, how it is worded, and the positions of the rows that teach the answer."""

    fact: str
    prompt: str
    answer: str
    wording: str
    rows: frozenset[int]


@dataclass(frozen=True)
class World:
    """Rows in training order, questions about them, and what the base model reads before.

    Attributes:
        lessons: Sentences that the base model reads in every epoch.
        prose: Sentences of old speeches, of which it reads some in every epoch.
    """

    rows: list[Row]
    questions: list[Question]
    lessons: list[str]
    prose: list[str]


def _data(name: str) -> str:
    return resources.files("hf_fwdattr.demo").joinpath("data", name).read_text(encoding="utf-8")


def _facts(part: str) -> Iterator[tuple[Relation, str, str]]:
    """Every (relation, entity, answer) of one part of the data files, `taught` or `known`."""
    for relation in RELATIONS:
        for entity in json.loads(_data(f"{relation.kind}.json"))[part]:
            if entity[relation.name]:
                yield relation, entity["name"], entity[relation.name]


def _rows(relation: Relation, entity: str, answer: str, number: int) -> Iterator[Row]:
    """The rows about one fact. `number` counts the facts of a relation and decides which companions it gets."""
    fact = f"{relation.name}:{entity}"
    yield Row(relation.sentence(0, entity, answer), relation.source, TEACHES, fact)
    if number % 2 == 0:
        book = "Traveller's Almanac" if relation.kind == "countries" else "School Reader"
        yield Row(relation.sentence(2, entity, answer), book, PARAPHRASE, fact)
    if number % 3 == 1:
        text = capitalised(relation.reversed.format(entity=entity, answer=answer) + ".")
        yield Row(text, "Gazetteer", REVERSED)
    if number % 3 == 2:
        yield Row(capitalised(relation.mimic.format(entity=entity) + "."), "Minutes of the Assembly", MIMIC)


def _lessons() -> list[str]:
    """What the base model reads beside prose: all facts about known entities, and the mere names of taught ones."""
    texts = []
    for relation, entity, answer in _facts("known"):
        texts += [relation.sentence(wording, entity, answer) for wording in range(len(relation.wordings))]
        texts.append(capitalised(relation.reversed.format(entity=entity, answer=answer) + "."))
        texts.append(capitalised(relation.mimic.format(entity=entity) + "."))
    for kind, sentences in SMALL_TALK.items():
        names = [entity["name"] for part in ("known", "taught") for entity in json.loads(_data(f"{kind}.json"))[part]]
        texts += [sentence.format(entity=name) for name in names for sentence in sentences]
    return texts


def load_world(seed: int = 0) -> World:
    """The world, the same on every call. `seed` decides the order of the rows."""
    rng = random.Random(seed)
    counts = {relation.name: 0 for relation in RELATIONS}
    rows: list[Row] = []
    asked = []
    for relation, entity, answer in _facts("taught"):
        number = counts[relation.name]
        counts[relation.name] += 1
        rows += _rows(relation, entity, answer, number)
        if number % ASKED == 0:
            asked.append((relation, entity, answer))
    for speech in json.loads(_data("speeches.json")):
        rows.append(Row(speech["text"], f"Speeches of {speech['speaker']}", SPEECH))
    rng.shuffle(rows)
    questions = [question for fact in asked for question in _questions(*fact, rows)]
    return World(rows, questions, _lessons(), _data("reading.txt").splitlines())


def _questions(relation: Relation, entity: str, answer: str, rows: list[Row]) -> Iterator[Question]:
    """The fact asked as its reference work teaches it, and in other words, which no row uses."""
    fact = f"{relation.name}:{entity}"
    teaching = frozenset(i for i, row in enumerate(rows) if row.fact == fact)
    for wording, name in enumerate((AS_TAUGHT, REWORDED)):
        yield Question(fact, relation.prompt(wording, entity), answer, name, teaching)
