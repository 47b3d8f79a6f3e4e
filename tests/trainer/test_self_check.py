"""The self-check, where scores are known to be right, and where they are made wrong."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_fwdattr import ResponseCallback
from hf_fwdattr.bank.verification import read_manifest
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.trainer import self_check
from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, fine_tune, trainer_for, training_set, weights


# Small steps of plain gradient descent: removal is what its derivative says, and the bank knows that derivative.
SETTINGS: dict[str, Any] = dict(optim="sgd", learning_rate=0.05, num_train_epochs=2, max_grad_norm=0.0)


def measured(folder: Path) -> dict[str, Any]:
    quality: dict[str, Any] = json.loads((folder / "fwdattr" / "bank.json").read_text())["quality"]["self_check"]
    return quality


def test_self_check_confirms_a_right_bank_and_leaves_training_untouched(tmp_path: Path) -> None:
    plain, checked = adapted(base()), adapted(base())
    fine_tune(tmp_path / "plain", plain, config(), **SETTINGS)
    callback = fine_tune(tmp_path / "checked", checked, config(self_check=2, parameters="lora"), **SETTINGS)
    assert torch.equal(weights(plain), weights(checked))
    assert callback.bank is not None
    assert checked.training == plain.training
    figures = measured(tmp_path / "checked")
    assert figures["left_out"] == 2
    assert figures["of"] == "sources"
    assert figures["replay_gap"] < 1e-6
    assert figures["pearson"] > 0.9
    assert 0.5 < figures["slope"] < 1.5


def test_self_check_detects_a_wrong_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_changes = self_check.predict_changes
    monkeypatch.setattr(self_check, "predict_changes", lambda *a: -predict_changes(*a))
    fine_tune(tmp_path, adapted(base()), config(self_check=2), **SETTINGS)
    assert measured(tmp_path)["slope"] < -0.5


def test_self_check_without_sources_leaves_out_twelfths_of_the_rows(tmp_path: Path) -> None:
    fine_tune(tmp_path, adapted(base()), config(self_check=3, source_column=None), **SETTINGS)
    figures = measured(tmp_path)
    assert (figures["left_out"], figures["of"]) == (3, "twelfths of the rows")
    assert figures["pearson"] > 0.8


def test_self_check_refuses_an_optimizer_made_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(base())
    live = [p for p in model.parameters() if p.requires_grad]
    optimizers = (torch.optim.SGD(live, lr=0.1, momentum=0.5), None)
    with caplog.at_level(logging.ERROR):
        callback = fine_tune(tmp_path, model, config(self_check=1), optimizers=optimizers, optim="sgd")
    assert "another SGD" in caplog.text
    assert callback.bank is not None
    assert read_manifest(tmp_path / "fwdattr").quality == {}
    assert torch.isfinite(weights(model)).all()


def test_self_check_without_a_trainer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no Trainer"):
        self_check.SelfCheck(base(), None)


def test_self_check_settings_are_validated() -> None:
    with pytest.raises(ValueError, match="self_check=-1"):
        config(self_check=-1)
    with pytest.raises(ValueError, match="private_rows"):
        config(self_check=1, private_rows=True)
    assert isinstance(ResponseCallback(config()).config.self_check, int)


def test_chosen_groups_are_whole_sources() -> None:
    source_of_row = torch.tensor([0, 1, -1, 1, 2, 0])
    groups, sources = self_check.choose_groups(source_of_row, 2, seed=0)
    assert len(sources) == 2
    for group, source in zip(groups, sources, strict=True):
        assert torch.equal(group, source_of_row == source)


def test_self_check_repeats_the_order_of_the_run(tmp_path: Path) -> None:
    """The last batch of an epoch is short, and gradients are accumulated: rows come in the same order."""
    fine_tune(
        tmp_path, adapted(base()), config(self_check=1), dataset=training_set(11), gradient_accumulation_steps=2,
        **SETTINGS,
    )  # fmt: skip
    assert measured(tmp_path)["replay_gap"] < 1e-6
    assert isinstance(trainer_for(tmp_path, base(), training_set(), None), Trainer)
