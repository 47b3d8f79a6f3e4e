"""The card's section: said once, in its place, and nothing in it can be more than text."""

import re
from pathlib import Path
from typing import Any

import cards
import pytest
import world_cards
from huggingface_hub import ModelCard

from hf_fwdattr.bank.card import section, with_section
from hf_fwdattr.bank.schema import Manifest
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import described, written, written_whole


ROOT = Path(__file__).parents[2]


def manifest(**changes: Any) -> Manifest:
    return Manifest.model_validate(described(**changes) | {"files": []})


def test_the_cards_of_this_repository_are_fresh() -> None:
    found = dict(cards.everything())
    assert sorted(found) == sorted((ROOT / "model_cards").glob("*/README.md"))
    for path, text in found.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.parent.name} is stale: run scripts/cards"


@pytest.mark.parametrize("world", world_cards.WORLDS, ids=lambda world: world.name)
def test_a_worlds_card_has_its_tables_and_its_pictures(world: world_cards.World) -> None:
    text = world_cards.rendered(world)
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert pictures
    for picture in pictures:
        assert (ROOT / "model_cards" / world.name / picture).read_bytes()[:4] == b"\x89PNG"
    assert text.count("\n|---") == len(world.measured)
    assert ModelCard(text).data.get("tags") == ["fwdattr"]


def test_the_template_is_the_packages(tmp_path: Path) -> None:
    own = ROOT / "hf_fwdattr" / "bank" / "section.md.jinja"
    assert (ROOT / "model_cards" / "TEMPLATE.md.jinja").read_text() == own.read_text()


def test_a_section_takes_the_place_of_the_older_one() -> None:
    first = with_section("---\nlicense: mit\ntags: lora\n---\n# Mine\n\nBefore.\n", manifest(), "me/adapter")
    edited = first.rstrip() + "\n\n## After\n\nMore of mine.\n"
    second = with_section(edited, manifest(explained_variance=0.5), "me/adapter")
    card = ModelCard(second)
    assert (card.data.get("license"), card.data.get("tags")) == ("mit", ["lora", "fwdattr"])
    assert second.count("## Response bank") == 1
    assert "0.500 of held-out" in second
    assert "0.900 of held-out" not in second
    assert second.index("Before.") < second.index("## Response bank") < second.index("More of mine.")
    assert with_section(second, manifest(explained_variance=0.5), "me/adapter") == second


def test_an_empty_card_begins_with_a_header() -> None:
    text = with_section("", manifest(dataset={"rows": 10, "repo": "me/data"}), "me/adapter")
    assert text.startswith("---\ntags:\n- fwdattr\ndatasets:\n- me/data\n---\n")
    assert "datasets" not in with_section("", manifest(dataset={"rows": 10, "repo": "json"}), "me/x").split("---")[1]


def test_a_broken_header_is_not_thrown_away() -> None:
    for header in ("tags: [", "- a\n- b"):
        with pytest.raises(BankError, match=r"header of README\.md is no valid YAML"):
            with_section(f"---\n{header}\n---\n# Mine\n", manifest(), "me/adapter")


def test_names_are_text_and_paths_stay_at_home() -> None:
    nasty = "x` |\n<script>alert(1)</script>\n---"
    text = section(manifest(model=nasty, dataset={"rows": 10, "repo": nasty, "split": nasty}), "me/adapter")
    assert "<script>" not in text
    assert [line for line in text.splitlines() if line.startswith("| base model")] == [
        "| base model | `x script alert(1) /script ---` |"
    ]
    assert "secret" not in section(manifest(model="/srv/secret/model"), "me/adapter")


def test_privacy_is_said() -> None:
    one, other = section(manifest(), "me/x"), section(manifest(privacy={"rows": "sources"}), "me/x")
    assert "salted for this bank" in one
    assert "every row against its hash" in " ".join(one.split())
    assert "no row, no row id and no row hash" in other
    assert "against its hash" not in " ".join(other.split())


def test_the_card_tells_of_the_first_look(tmp_path: Path) -> None:
    whole, plain = (
        section(written_whole(tmp_path / "a").manifest, "me/x"),
        section(written(tmp_path / "b").manifest, "me/x"),
    )
    assert "| first look | one forward pass explains 0.00 of the variance" in whole
    assert "the rows' own responses are kept, one byte a number |\n| measured quality |" in whole
    assert "first look" not in plain
    assert "directions" in plain.split("| measured quality |")[0]
