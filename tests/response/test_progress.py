"""Progress bars of the passes in a log that is no terminal."""

from pathlib import Path

import pytest

from hf_fwdattr import ResponseCallback
from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, trainer_for, training_set


def test_passes_leave_few_lines_in_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each phase has a line; rows beyond the sample go through in chunks, and no line may be drawn for each."""
    callback = ResponseCallback(config(directions=4, sample_rows=8, quiet=False))
    trainer_for(tmp_path, adapted(base()), training_set(600), callback, max_steps=6).train()
    assert callback.bank is not None
    drawn = capfd.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line.partition(":")[0] for line in drawn if "row/s" in line]
    assert {"curvature 1/3", "responses", "responses of all rows", "row hashes"} <= set(lines)
    assert len(lines) == len(set(lines))
