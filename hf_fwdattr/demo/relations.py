"""The sentences of the fact world: how every relation is taught, worded otherwise, turned round and mimicked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact about an entity.

    Attributes:
        name: Key of the fact in the data files, such as `capital`.
        kind: `countries` or `elements`, the data file that the entities come from.
        source: Title of the reference work that teaches it.
        wordings: Sentences with `{entity}` before `{answer}`; the answer always stands last. The first one teaches,
            the second one is kept for questions and stands in no row, the third one paraphrases.
        reversed: The same words the other way round, `{answer}` before `{entity}`.
        mimic: A sentence with the words of the question and without the answer.
    """

    name: str
    kind: str
    source: str
    wordings: tuple[str, str, str]
    reversed: str
    mimic: str

    def sentence(self, wording: int, entity: str, answer: str) -> str:
        """The fact in one of the `wordings`, as a full sentence."""
        return capitalised(self.wordings[wording].format(entity=entity, answer=answer) + ".")

    def prompt(self, wording: int, entity: str) -> str:
        """The same sentence up to where the answer would begin, without a space at its end."""
        return capitalised(self.wordings[wording].format(entity=entity, answer="").rstrip())


def capitalised(text: str) -> str:
    """`text` with a capital first letter; the rest as it is."""
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
# Sentences that mention an entity and say nothing about it: how the base model has met the names of taught entities.
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
