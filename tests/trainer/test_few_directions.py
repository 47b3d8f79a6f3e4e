"""Too few directions for the rows at hand are said aloud."""

import logging
from pathlib import Path

import pytest

from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, fine_tune


@pytest.mark.parametrize(("directions", "warned"), [(1, True), ("exact", False)])
def test_few_probes_are_said(
    directions: int | str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_fwdattr"):
        bank = fine_tune(tmp_path, adapted(base()), config(directions=directions)).bank
    assert bank is not None
    said = [record.getMessage() for record in caplog.records if "directions keep" in record.getMessage()]
    assert bool(said) == warned
    if warned:
        assert bank.manifest.explained_variance < 0.5
        assert said[0].startswith("1 directions keep")
        assert "exact" in said[0]
