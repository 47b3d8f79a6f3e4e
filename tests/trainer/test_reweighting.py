"""Row weights in a real Trainer, against its own loss and against gradients of the definition."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.models.likelihood import CAUSAL_LM, row_losses
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.trainer.reweighting import RetrainFunction, apply_row_weights, query_losses
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree
from tests.helpers.runs import ROWS, base, queries, trainer_for, training_set, weights


def bare(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The collator of the tests, for rows with more columns."""
    return padded([{key: row[key] for key in ("input_ids", "labels")} for row in rows])


def make(folder: Path, **changes: Any) -> Trainer:
    return trainer_for(folder, adapted(base()), training_set(), None, **changes)


def ends(folder: Path, given: Tensor | None, **changes: Any) -> Tensor:
    trainer = make(folder, **changes)
    if given is not None:
        apply_row_weights(trainer, given)
    trainer.train()
    return weights(trainer.model)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"remove_unused_columns": False}])
def test_unit_row_weights_change_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = changes | {"collate": bare}
    agree(ends(tmp_path, torch.ones(ROWS), **changes), ends(tmp_path, None, **changes), 1e-6)  # theirs is float32


def test_row_weight_multiplies_the_loss_of_its_row_alone(tmp_path: Path) -> None:
    """One step of SGD on all rows: the weights move by the weighted sum of row gradients over all tokens."""
    given = torch.linspace(0, 2, ROWS, dtype=torch.float64)
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=ROWS, num_train_epochs=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    moved = ends(tmp_path, given, **settings)
    model = adapted(base())
    before = weights(model)
    model.train()
    batch = bare(list(training_set()))
    divisor = (batch["labels"] != -100).sum()  # the Trainer counts first tokens too where peft wraps the model
    loss = (row_losses(*CAUSAL_LM.forward(model, batch)) * given).sum() / divisor
    live = TrackedParameters.of(model, "trainable").tensors(model)
    step = torch.cat([g.flatten() for g in torch.autograd.grad(loss, live)])
    agree(moved, before - 0.1 * step, 1e-9)


def test_row_weights_for_other_rows_or_other_losses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="5 weights for 12 rows"):
        apply_row_weights(make(tmp_path), torch.ones(5))
    with pytest.raises(UnsupportedError, match="compute_loss_func"):
        apply_row_weights(make(tmp_path, compute_loss_func=lambda *_, **__: None), torch.ones(ROWS))


def test_query_losses_match_the_objective(tmp_path: Path) -> None:
    model = adapted(base()).train()
    some = queries(3)
    expected = [row_losses(*CAUSAL_LM.forward(model.eval(), padded([q])))[0].item() for q in some]
    agree(query_losses(model.train(), some), torch.tensor(expected, dtype=torch.float64), 1e-9)
    assert model.training


def test_retrain_function_takes_subsets_and_weights(tmp_path: Path) -> None:
    train = RetrainFunction(lambda seed: make(tmp_path / "runs", seed=seed), queries(3))
    half = torch.arange(ROWS) % 2 == 0
    losses = retrain(train, half[None], [3, 4], tmp_path / "kept", quiet=True, name="t")
    assert losses.shape == (2, 1, 3)
    assert not torch.equal(losses[0], losses[1])
    trainer = trainer_for(tmp_path, adapted(base()), training_set().select(range(0, ROWS, 2)), None)
    trainer.train()
    agree(losses[0, 0], query_losses(trainer.model, queries(3)), 1e-6)
    whole = train(torch.ones(ROWS), 3)
    assert not torch.equal(whole, train(torch.ones(ROWS).index_fill(0, torch.tensor([2]), 0.0), 3))
