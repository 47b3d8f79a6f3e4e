"""Warning about directions that explain little of the rows' scores."""

import logging
from pathlib import Path

import pytest

from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, fine_tune


@pytest.mark.parametrize(("directions", "warned"), [(1, True), ("exact", False)])
def test_too_few_directions_are_warned_about(
    directions: int | str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_fwdattr"):
        bank = fine_tune(tmp_path, adapted(base()), config(directions=directions)).bank
    assert bank is not None
    messages = [text for record in caplog.records if "directions explain" in (text := record.getMessage())]
    assert bool(messages) == warned
    if warned:
        assert bank.manifest.explained_variance < 0.5
        assert messages[0].startswith("1 directions explain")
        assert "exact" in messages[0]
