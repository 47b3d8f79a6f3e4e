from pathlib import Path

import pytest

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.card import quality_text, repository_in, with_section
from hf_fwdattr.bank.quality import add_quality
from hf_fwdattr.bank.verification import read_manifest
from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import described, parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bank(tmp_path / "fwdattr", BankContents(described(quality={"LDS": 0.5}), **parts()))
    return tmp_path / "fwdattr"


def test_added_figures_leave_the_bank_sound(folder: Path) -> None:
    add_quality(folder, {"self_check": {"slope": 0.93, "of": "sources"}})
    add_quality(folder, {"LDS": 0.6})
    assert read_manifest(folder).quality == {"LDS": 0.6, "self_check": {"slope": 0.93, "of": "sources"}}
    assert ResponseBank(folder).manifest.quality["LDS"] == 0.6
    assert not list(folder.glob("*.tmp*"))


def test_card_above_shows_the_figures_and_keeps_its_name(folder: Path) -> None:
    card = folder.parent / "README.md"
    card.write_text(with_section("---\ntags: []\n---\n\nMine.\n", read_manifest(folder), "me/else"))
    add_quality(folder, {"self_check": {"slope": 0.93}})
    text = card.read_text()
    assert "self check (slope 0.93)" in text
    assert "Mine." in text
    assert repository_in(text) == "me/else"
    assert text.count("fwdattr: begin") == 1


def test_card_without_the_section_is_left_alone(folder: Path) -> None:
    card = folder.parent / "README.md"
    card.write_text("Mine.\n")
    add_quality(folder, {"LDS": 0.7})
    assert card.read_text() == "Mine.\n"


@pytest.mark.parametrize("bad", [float("nan"), {"slope": float("inf")}, [1, 2], None], ids=str)
def test_unusable_figure_is_not_written(folder: Path, bad: object) -> None:
    with pytest.raises(ValueError, match=r"quality\.x"):
        add_quality(folder, {"x": bad})
    assert read_manifest(folder).quality == {"LDS": 0.5}


def test_folder_without_a_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no bank"):
        add_quality(tmp_path, {"LDS": 0.5})


def test_quality_text_is_one_line() -> None:
    assert (
        quality_text({"LDS": 0.9, "self_check": {"slope": 1.0, "left_out": 4}})
        == "LDS 0.9, self check (slope 1.0, left out 4)"
    )
