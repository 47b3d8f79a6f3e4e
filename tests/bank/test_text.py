"""The rows' text in a bank: only where it was asked for, and read no further than it is shown."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.card import section
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import ROWS, TEXTS, written, written_with_text
from tests.bank.test_damage import resign, shard
from tests.helpers.hub_world import World


@pytest.mark.parametrize("shard_size", [1 << 30, 20, 1])
def test_texts_are_read_by_position(tmp_path: Path, shard_size: int) -> None:
    written_with_text(tmp_path, shard_size)
    bank = ResponseBank.from_pretrained(tmp_path)
    assert bank.texts(range(ROWS)) == TEXTS
    assert bank.texts([9, 0, 9, 2]) == [TEXTS[9], TEXTS[0], TEXTS[9], TEXTS[2]]
    assert bank.texts([]) == []
    copied = ResponseBank(bank.save_pretrained(tmp_path / "copy"))
    assert copied.texts([4]) == [TEXTS[4]]


def test_bank_keeps_no_text_by_default(tmp_path: Path) -> None:
    bank = written(tmp_path)
    assert not bank.manifest.privacy.text
    with pytest.raises(BankError, match=r"the bank holds no text of its rows\. Pass the training set as dataset="):
        bank.texts([0])


def test_only_shards_of_the_wanted_rows_are_downloaded(hub: World, tmp_path: Path) -> None:
    written_with_text(tmp_path / "bank", shard_size=1).push_to_hub("me/adapter")
    hub.clean()
    bank = ResponseBank.from_pretrained("me/adapter")
    bank.directions(), list(bank.coordinates())
    assert hub.server.sent("/text-") == 0
    assert bank.texts([4]) == [TEXTS[4]]
    (file,) = (
        file for file in bank.manifest.files if file.kind == "text" and file.first <= 4 < file.first + file.lines
    )
    assert hub.server.sent("/text-") == file.size


def test_card_says_whether_text_is_kept(tmp_path: Path) -> None:
    one, other = (
        section(bank.manifest, "me/x") for bank in (written(tmp_path / "a"), written_with_text(tmp_path / "b"))
    )
    assert "No text of the rows is in the bank." in one
    assert "The text of every row is in the bank, as its author chose (`include_text`)" in other
    assert "dataset=... shows the rows themselves" not in other


@pytest.mark.parametrize(
    "offsets",
    [
        [0] * (ROWS + 1), [1] * (ROWS + 1), [-1] + [0] * (ROWS - 1) + [83], [0] * ROWS + [1 << 62],
        [0, 50, 3, *range(3, 10), 83], [-(1 << 63)] * (ROWS + 1),
    ],
)  # fmt: skip
def test_offsets_outside_the_text_are_refused(tmp_path: Path, offsets: list[int]) -> None:
    """Size and hash are made to fit, as a forger would."""
    written_with_text(tmp_path)
    length = sum(len(text.encode()) for text in TEXTS)
    offsets = [length if value == 83 else value for value in offsets]
    path = shard(tmp_path, "text")
    save_file({"offsets": torch.tensor(offsets), "text": torch.full((length,), 65, dtype=torch.uint8)}, path)
    resign(tmp_path, path)
    with pytest.raises(BankError, match="its offsets do not divide its text"):
        ResponseBank(tmp_path).texts([0])


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    written_with_text(tmp_path)
    path = shard(tmp_path, "text")
    ends = torch.arange(ROWS + 1)
    save_file({"offsets": ends, "text": torch.full((ROWS,), 255, dtype=torch.uint8)}, path)
    resign(tmp_path, path)
    with pytest.raises(BankError, match="the text of row 3 is not UTF-8"):
        ResponseBank(tmp_path).texts([3])
