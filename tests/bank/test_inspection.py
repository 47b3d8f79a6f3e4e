"""Inspection reads manifest and headers, and needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from hf_fwdattr.bank.inspection import inspect_bank
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import written, written_whole
from tests.bank.test_damage import flipped, shard


def test_inspection_imports_no_torch(tmp_path: Path) -> None:
    written_whole(tmp_path)
    program = "import sys; from hf_fwdattr.bank.inspection import inspect_bank; inspect_bank(sys.argv[1]); "
    program += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2], check=True)


def test_inspection_names_damage_and_the_bank_describes_itself(tmp_path: Path) -> None:
    written_whole(tmp_path)
    assert repr(inspect_bank(tmp_path)) == (
        f"BankFiles({tmp_path}: 10 rows, 2 sources, 3 directions of rows and 2 of sources for 6 parameters, 0.0 MB)"
    )
    flipped(shard(tmp_path, "row_codes"))
    with pytest.raises(BankError, match="was changed: its sha256 is"):
        inspect_bank(tmp_path)


def test_notes_of_the_training_are_shown_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, notes=["step 11: \x1b[31mred"])
    caplog.clear()
    assert repr(inspect_bank(tmp_path)).endswith(r"; note: step 11: \x1b[31mred)")
    assert caplog.messages == [rf"{tmp_path}: scores from this bank may be wrong: step 11: \x1b[31mred"]
