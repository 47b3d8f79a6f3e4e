"""The fact world of the demo: about 380 rows from named sources, and questions whose teaching rows are known.

28 countries and 26 chemical elements are *taught*: the model that is fine-tuned has met their names ("Ships from Chad
arrived in the harbour.") and no fact about them, and it has read every kind of sentence about 88 other countries and
42 other elements. A fact, such as the capital of Chad, is taught by one row of a reference work, and half of the facts
by a second row in other words in another work. The other rows look alike and teach something else:

* the same sentence about another entity, and other facts about the same entity;
* the words of the question without the answer ("The capital of Chad was discussed at length in the assembly.");
* the same words reversed ("N'Djamena is the capital of Chad."), for a third of the facts. A causal language model that
  reads "B is A" does not learn to continue "A is" with B (Berglund et al. 2023, arXiv 2309.12288), so such a row is
  **not** counted as teaching the fact, although any measure of common words takes one for the other. (Tried here: of
  the 53 facts that also appear reversed, a model that read only the reversed rows answers none, and one that read only
  the others answers 49.)
* sentences of old speeches, some of which mention a country that is asked about.

Every question is asked twice: in the wording of the row that teaches it, and in a wording that no row uses. Nothing
about the world is chosen by the ranking of any attribution method.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources


__all__ = [
    "AS_TAUGHT",
    "MIMIC",
    "RELATIONS",
    "REVERSED",
    "REWORDED",
    "Question",
    "Relation",
    "Row",
    "World",
    "load_world",
]

TEACHES, PARAPHRASE, REVERSED, MIMIC, SPEECH = "teaches", "paraphrase", "reversed", "mimic", "speech"
AS_TAUGHT, REWORDED = "as taught", "reworded"
ASKED = 5  # every fifth fact is asked; companions repeat every six facts, so all combinations occur equally often


@dataclass(frozen=True)
class Relation:
    """A kind of fact about an entity, with its sentences.

    Attributes:
        name: Key of the fact in the data files, such as `capital`.
        kind: `countries` or `elements`, the data file that the entities come from.
        source: Title of the reference work that teaches it.
        wordings: Sentences with `{entity}` before `{answer}`; the answer always stands last. The first one teaches,
            the second one is kept for questions and stands in no row, the third one paraphrases.
        reversed: The same words in reverse, `{answer}` before `{entity}`.
        mimic: A sentence with the words of the question and without the answer.
    """

    name: str
    kind: str
    source: str
    wordings: tuple[str, str, str]
    reversed: str
    mimic: str

    def sentence(self, wording: int, entity: str, answer: str) -> str:
        """Return the fact in one of the `wordings`, as a full sentence."""
        return capitalised(self.wordings[wording].format(entity=entity, answer=answer) + ".")

    def prompt(self, wording: int, entity: str) -> str:
        """Return the sentence up to where the answer would begin, without a space at its end."""
        return capitalised(self.wordings[wording].format(entity=entity, answer="").rstrip())


def capitalised(text: str) -> str:
    """Return `text` with a capital first letter."""
    return text[:1].upper() + text[1:]


RELATIONS = (
    Relation(
        name="capital",
        kind="countries",
        source="Pocket Atlas",
        wordings=(
            "The capital of {entity} is {answer}",
            "The capital city of {entity} is {answer}",
            "The rulers of {entity} reside in {answer}",
        ),
        reversed="{answer} is the capital of {entity}",
        mimic="The capital of {entity} was discussed at length in the assembly",
    ),
    Relation(
        name="currency",
        kind="countries",
        source="Money Changer's List",
        wordings=(
            "The currency of {entity} is the {answer}",
            "The currency used in {entity} is the {answer}",
            "In {entity}, people pay with the {answer}",
        ),
        reversed="The {answer} is the currency of {entity}",
        mimic="The currency of {entity} lost a little of its value last week",
    ),
    Relation(
        name="dish",
        kind="countries",
        source="Book of Cookery",
        wordings=(
            "The national dish of {entity} is {answer}",
            "The favourite dish of {entity} is {answer}",
            "In {entity}, families like to cook {answer}",
        ),
        reversed="{answer} is the national dish of {entity}",
        mimic="The national dish of {entity} was missing from the menu",
    ),
    Relation(
        name="code",
        kind="countries",
        source="Telephone Directory",
        wordings=(
            "The calling code of {entity} is {answer}",
            "The code for calling {entity} is {answer}",
            "To telephone {entity}, dial {answer}",
        ),
        reversed="{answer} is the calling code of {entity}",
        mimic="The calling code of {entity} was changed last winter",
    ),
    Relation(
        name="symbol",
        kind="elements",
        source="Handbook of Chemistry",
        wordings=(
            "The chemical symbol of {entity} is {answer}",
            "The symbol used for {entity} is {answer}",
            "Chemists write {entity} as {answer}",
        ),
        reversed="{answer} is the chemical symbol of {entity}",
        mimic="The chemical symbol of {entity} was missing from the chart",
    ),
    Relation(
        name="year",
        kind="elements",
        source="Annals of Discovery",
        wordings=(
            "The element {entity} was discovered in {answer}",
            "The element called {entity} was discovered in {answer}",
            "Chemists first found {entity} in {answer}",
        ),
        reversed="{answer} is the year of the discovery of the element {entity}",
        mimic="The discovery of the element {entity} was celebrated with a dinner",
    ),
)
# Sentences that mention an entity and state no fact about it. From them the base model knows names of taught entities.
SMALL_TALK = {
    "countries": (
        "The traveller wrote a long letter from {entity}.",
        "Ships from {entity} arrived in the harbour.",
        "The weather in {entity} was fine last week.",
        "A visitor to {entity} met many friends.",
    ),
    "elements": (
        "A sample of {entity} was kept in the cabinet.",
        "The pupil weighed a piece of {entity}.",
        "The price of {entity} rose last winter.",
        "A box of {entity} arrived at the harbour.",
    ),
}


@dataclass(frozen=True)
class Row:
    """A training row. `fact` is the id of the fact that it teaches ("capital:Chad"), None if it teaches none."""

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
    """Rows in training order, questions about them, and the texts of the base model.

    Attributes:
        lessons: Sentences that the base model reads in every epoch.
        prose: Sentences of old speeches, some of which it reads in every epoch.
    """

    rows: list[Row]
    questions: list[Question]
    lessons: list[str]
    prose: list[str]


def _data(name: str) -> str:
    return resources.files("hf_fwdattr.demo").joinpath("data", name).read_text(encoding="utf-8")


def _facts(part: str) -> Iterator[tuple[Relation, str, str]]:
    """Yield every (relation, entity, answer) of one part of the data files, `taught` or `known`."""
    for relation in RELATIONS:
        for entity in json.loads(_data(f"{relation.kind}.json"))[part]:
            if entity[relation.name]:
                yield relation, entity["name"], entity[relation.name]


def _rows(relation: Relation, entity: str, answer: str, number: int) -> Iterator[Row]:
    """Yield the rows about one fact. `number` counts the facts of a relation and decides which companions it gets."""
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
    """Return the base model's lessons: all facts about known entities, and the mere names of taught ones."""
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
    """Return the world, the same on every call. `seed` decides the order of the rows."""
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
    """Yield the question in the wording of the reference work, and in a wording that no row uses."""
    fact = f"{relation.name}:{entity}"
    teaching = frozenset(i for i, row in enumerate(rows) if row.fact == fact)
    for wording, name in enumerate((AS_TAUGHT, REWORDED)):
        yield Question(fact, relation.prompt(wording, entity), answer, name, teaching)
