"""The card's section: there once, in its place, and nothing in it can be more than text."""

import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks.report.pages import pages
from huggingface_hub import ModelCard

from hf_fwdattr.bank.card import section, with_section
from hf_fwdattr.bank.schema import Manifest, Pointer
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import described, written, written_whole


ROOT = Path(__file__).parents[2]


def manifest(**changes: Any) -> Manifest:
    return Manifest.model_validate(described(**changes) | {"files": []})


def test_cards_of_this_repository_are_fresh() -> None:
    texts = {path: text for path, text in pages() if path.name == "README.md"}
    assert sorted(texts) == sorted((ROOT / "model_cards").glob("*/README.md"))
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.parent.name} is stale"
        card = ModelCard(text)
        assert card.data.get("tags") == ["fwdattr"]
        for picture in re.findall(r"!\[.+\]\((.+)\)", card.text):
            assert (path.parent / picture).read_bytes()[:4] == b"\x89PNG"


def test_section_takes_the_place_of_the_older_one() -> None:
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


def test_empty_card_begins_with_a_header() -> None:
    text = with_section("", manifest(dataset={"rows": 10, "repo": "me/data"}), "me/adapter")
    assert text.startswith("---\ntags:\n- fwdattr\ndatasets:\n- me/data\n---\n")
    assert "datasets" not in with_section("", manifest(dataset={"rows": 10, "repo": "json"}), "me/x").split("---")[1]


def test_broken_header_is_refused() -> None:
    for header in ("tags: [", "- a\n- b"):
        with pytest.raises(BankError, match=r"header of README\.md is no valid YAML"):
            with_section(f"---\n{header}\n---\n# Mine\n", manifest(), "me/adapter")


def test_notes_of_the_training_are_shown_and_are_plain_text() -> None:
    note = "step 11: [a](http://b) | <b>\x1b[31m"
    assert "scores may be wrong: step 11: a (http://b) b" in section(manifest(notes=[note]), "me/adapter")
    assert "notes of the training" not in section(manifest(), "me/adapter")
    for notes in (["x" * 501], ["x"] * 17, [1]):
        with pytest.raises(ValueError, match="notes"):
            manifest(notes=notes)


def test_names_are_plain_text_and_local_paths_are_left_out() -> None:
    nasty = "x` |\n<script>alert(1)</script>\n---"
    text = section(manifest(model=nasty, dataset={"rows": 10, "repo": nasty, "split": nasty}), "me/adapter")
    assert "<script>" not in text
    assert [line for line in text.splitlines() if line.startswith("| base model")] == [
        "| base model | `x script alert(1) /script ---` |"
    ]
    assert "secret" not in section(manifest(model="/srv/secret/model"), "me/adapter")


@pytest.mark.parametrize("field", ["optimizer", "model"])
def test_forged_descriptions_are_plain_text(field: str) -> None:
    nasty = "x|\n![a](https://evil/p.png)<img src=y onerror=z>&lt;b\u202egpj\u2066\x1b[31m"
    text = section(manifest(**{field: nasty}), "me/adapter")
    assert not set(text) & {"\u202e", "\u2066", "\x1b"}
    assert not re.search(r"!\[|<img|&lt;|\]\(https", text)
    assert text.count("\n|") == section(manifest(), "me/adapter").count("\n|")


def test_byte_order_mark_loses_no_header() -> None:
    text = with_section("\ufeff---\nlicense: mit\n---\n# Mine\n", manifest(), "me/adapter")
    assert ModelCard(text).data.get("license") == "mit"
    assert text.count("license: mit") == 1
    assert "\ufeff" not in text


def test_section_states_what_is_kept_of_rows() -> None:
    one, other = section(manifest(), "me/x"), section(manifest(privacy={"rows": "sources"}), "me/x")
    assert "salted for this bank" in one
    assert "every row against its hash" in " ".join(one.split())
    assert "no row, no row id and no row hash" in other
    assert "against its hash" not in " ".join(other.split())


def test_section_states_the_gradient_predictor(tmp_path: Path) -> None:
    whole, plain = (
        section(written_whole(tmp_path / "a").manifest, "me/x"),
        section(written(tmp_path / "b").manifest, "me/x"),
    )
    assert "| gradient predictor | one forward pass explains 0.00 of the variance" in whole
    assert "| row codes | every row's response in 4 bits a number |\n| measured quality |" in whole
    assert "gradient predictor" not in plain
    assert "directions" in plain.split("| measured quality |")[0]


def test_section_names_the_repository_that_is_pointed_to() -> None:
    pointer = Pointer(bank_repo="me/bank", revision="0" * 40)
    text = section(manifest(averaging="trajectory", exact=True), "me/x", pointer=pointer)
    assert f"[me/bank](/datasets/me/bank) at commit `{'0' * 40}`. With it, `hf_fwdattr` scores" in text
    assert "They are means over models that stop" in text
    assert "do not keep everything" not in text
