"""The self-check, in a world where scores are known to be right, and where they are made wrong."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_fwdattr import ResponseCallback
from hf_fwdattr.bank.schema import read_manifest
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.trainer import self_check as selfcheck
from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, fine_tune, trainer_for, training_set, weights


# Small steps of plain gradient descent: removal is what its derivative says, and the bank knows that derivative.
SETTINGS: dict[str, Any] = dict(optim="sgd", learning_rate=0.05, num_train_epochs=2, max_grad_norm=0.0)


def measured(folder: Path) -> dict[str, Any]:
    quality: dict[str, Any] = json.loads((folder / "fwdattr" / "bank.json").read_text())["quality"]["self_check"]
    return quality


def test_a_right_bank_is_found_right_and_the_training_is_untouched(tmp_path: Path) -> None:
    plain, checked = adapted(base()), adapted(base())
    fine_tune(tmp_path / "plain", plain, config(), **SETTINGS)
    callback = fine_tune(tmp_path / "checked", checked, config(self_check=2, parameters="lora"), **SETTINGS)
    assert torch.equal(weights(plain), weights(checked))
    assert callback.bank is not None
    assert checked.training == plain.training
    found = measured(tmp_path / "checked")
    assert found["left_out"] == 2
    assert found["of"] == "sources"
    assert found["replay_gap"] < 1e-6
    assert found["pearson"] > 0.9
    assert 0.5 < found["slope"] < 1.5


def test_a_bank_of_the_wrong_sign_is_found_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = selfcheck.predicted
    monkeypatch.setattr(selfcheck, "predicted", lambda *a: -true(*a))
    fine_tune(tmp_path, adapted(base()), config(self_check=2), **SETTINGS)
    assert measured(tmp_path)["slope"] < -0.5


def test_rows_without_sources_are_left_out_by_twelfths(tmp_path: Path) -> None:
    fine_tune(tmp_path, adapted(base()), config(self_check=3, source_column=None), **SETTINGS)
    found = measured(tmp_path)
    assert (found["left_out"], found["of"]) == (3, "twelfths of the rows")
    assert found["pearson"] > 0.8


def test_an_optimizer_from_outside_is_not_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(base())
    live = [p for p in model.parameters() if p.requires_grad]
    optimizers = (torch.optim.SGD(live, lr=0.1, momentum=0.5), None)
    with caplog.at_level(logging.ERROR):
        callback = fine_tune(tmp_path, model, config(self_check=1), optimizers=optimizers, optim="sgd")
    assert "another SGD" in caplog.text
    assert callback.bank is not None
    assert read_manifest(tmp_path / "fwdattr").quality == {}
    assert torch.isfinite(weights(model)).all()


def test_without_a_trainer_it_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no Trainer"):
        selfcheck.SelfCheck(base(), None)


def test_settings() -> None:
    with pytest.raises(ValueError, match="self_check=-1"):
        config(self_check=-1)
    with pytest.raises(ValueError, match="private_rows"):
        config(self_check=1, private_rows=True)
    assert isinstance(ResponseCallback(config()).config.self_check, int)


def test_chosen_groups_are_whole_sources() -> None:
    owner = torch.tensor([0, 1, -1, 1, 2, 0])
    groups, names = selfcheck.chosen(owner, 2, seed=0)
    assert len(names) == 2
    for group, name in zip(groups, names, strict=True):
        assert torch.equal(group, owner == name)


def test_the_order_is_that_of_the_run(tmp_path: Path) -> None:
    """Epochs whose last batch is short, and accumulation: rows come as they came."""
    fine_tune(
        tmp_path, adapted(base()), config(self_check=1), dataset=training_set(11), gradient_accumulation_steps=2,
        **SETTINGS,
    )  # fmt: skip
    assert measured(tmp_path)["replay_gap"] < 1e-6
    assert isinstance(trainer_for(tmp_path, base(), training_set(), None), Trainer)
