"""Progress bars of the passes in a log that is no terminal."""

from pathlib import Path

import pytest

from hf_fwdattr import ResponseCallback
from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, trainer_for, training_set


def test_passes_leave_few_lines_in_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows beyond the sample go through the segments in chunks: no bar may be drawn for each."""
    callback = ResponseCallback(config(directions=4, sample_rows=8, quiet=False))
    trainer_for(tmp_path, adapted(base()), training_set(600), callback, max_steps=6).train()
    assert callback.bank is not None
    drawn = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert 0 < sum("row/s" in line for line in drawn) <= 8
