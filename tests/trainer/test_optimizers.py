"""Optimizers that are used with LoRA: under small steps the scores of all rows sum to what training changed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.trainer.adafactor import UpdateClipping, clipping_factor, inverse_root
from hf_fwdattr.trainer.optimizer import Preconditioner
from hf_fwdattr.trainer.optimizer_state import adam_moments
from hf_fwdattr.trainer.step_checks import StepCheck
from tests.helpers.optimizers import (
    RATE,
    SHORT,
    Make,
    adafactor,
    changed_and_scored,
    check_recorded_in_the_bank,
    check_refusal,
    check_scores_sum_to_the_change,
    check_steps_against_the_state,
)
from tests.helpers.reference import agree


ROOT = Path(__file__).parents[2]
LIBRARIES = Path(sys.prefix) / "optimizers"  # where scripts/test puts torchao and bitsandbytes


def test_optimizers_of_other_libraries() -> None:
    """In a process of its own, the only one that has the libraries."""
    assert LIBRARIES.is_dir(), "bash scripts/test installs torchao and bitsandbytes there"
    environment = os.environ | {"PYTHONPATH": str(LIBRARIES)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/trainer/low_bit_optimizers.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "skipped" not in run.stdout


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, **SHORT), id="AdamW"),
        pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, fused=True, **SHORT), id="AdamW, fused"),
        pytest.param(adafactor, id="Adafactor"),
    ],
)
def test_scores_sum_to_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    check_scores_sum_to_the_change(tmp_path, monkeypatch, make)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, fused=True), id="AdamW, fused"),
        pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, amsgrad=True), id="AdamW, amsgrad"),
        pytest.param(adafactor, id="Adafactor"),
        pytest.param(lambda some: adafactor(some, weight_decay=0.1, beta1=0.9), id="Adafactor with a first moment"),
    ],
)
def test_step_is_checked_against_the_state(make: Make) -> None:
    check_steps_against_the_state(make)


def test_fused_steps_give_the_same_scores(tmp_path: Path) -> None:
    _, fused, _ = changed_and_scored(tmp_path / "fused", lambda some: torch.optim.AdamW(some, fused=True))
    _, plain, _ = changed_and_scored(tmp_path / "plain", lambda some: torch.optim.AdamW(some, fused=False))
    agree(fused, plain, 1e-4)


@pytest.mark.parametrize("shape", [(6, 5), (7,)], ids=["factored", "vector"])
def test_adafactor_diagonal_is_the_factor_of_its_step(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = adafactor([weight])
    group, clipping = optimizer.param_groups[0], UpdateClipping()
    factors = []
    for _ in range(20):
        before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
        optimizer.step()
        state = optimizer.state[weight]
        clipping.record(weight, state, group)
        whole = (before - weight.detach()) / (RATE * weight.grad)
        factors.append(float((whole / inverse_root(state)).mean()))
        agree(clipping_factor(weight.grad, inverse_root(state), group) * inverse_root(state).double(), whole, 1e-5)
    assert min(factors) < 0.99
    ages = 0.9 ** torch.arange(19, -1, -1, dtype=torch.float64)
    average = float((ages * torch.tensor(factors, dtype=torch.float64)).sum() / ages.sum())
    assert float(clipping.factor(weight)) == pytest.approx(average, rel=1e-5)


def test_adafactor_diagonal_of_the_callback_knows_the_clipping(tmp_path: Path) -> None:
    _, _, callback = changed_and_scored(tmp_path, adafactor)
    clipping = callback.recorder.preconditioner.update_clipping
    factors = [
        float(clipping.factor(weight)) for weight in callback.recorder.model.parameters() if weight.requires_grad
    ]
    assert len(factors) == 4
    assert max(factors) < 1.0


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_adafactor_with_small_gradients_and_none(size: float) -> None:
    """It has no eps as Adam has: gradients of 1e-9 move weights as far as large ones, and zeros do not."""
    layer: Any = nn.Linear(3, 4, bias=False)
    optimizer, parameters = adafactor([layer.weight]), TrackedParameters.of(layer, "trainable")
    preconditioner = Preconditioner.of(optimizer, layer, parameters)
    check = StepCheck(optimizer, preconditioner, dict(layer.named_parameters()))
    for _ in range(3):
        layer.weight.grad = size * torch.ones_like(layer.weight)
        assert check.gradients(1.0, 1.0) is None
        optimizer.step()
        check.record_update_clipping()
        assert check.step() is None
    diagonal = preconditioner.diagonal(optimizer, layer, parameters)
    if size:
        agree(diagonal, torch.full((12,), 1e9), 0.01)
    else:
        assert float(diagonal.max()) < 1e-9


@pytest.mark.parametrize("option", ["nesterov", "dampening"])
def test_options_of_sgd_without_a_closed_form_are_refused(option: str) -> None:
    layer = nn.Linear(3, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.param_groups[0][option] = True
    with pytest.raises(UnsupportedError, match=f"{option}=True of SGD"):
        Preconditioner.of(optimizer, layer, TrackedParameters.of(layer, "trainable"))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_frozen_weight_has_next_to_no_diagonal(name: str) -> None:
    layer = nn.Linear(3, 3, bias=False)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1)
    preconditioner = Preconditioner.of(optimizer, layer, TrackedParameters.of(layer, "trainable"))
    parameters = TrackedParameters.of(layer, "trainable")
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    layer.weight.requires_grad_(False)
    assert float(preconditioner.diagonal(optimizer, layer, parameters).max()) < 1e-9


def test_amsgrad_has_the_largest_second_moment() -> None:
    weight: Any = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, amsgrad=True)
    for size in (1.0, 0.0, 0.0):
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
    state, group = optimizer.state[weight], optimizer.param_groups[0]
    assert torch.equal(adam_moments(state, group).second, state["max_exp_avg_sq"])
    assert float(state["exp_avg_sq"].max()) < float(state["max_exp_avg_sq"].min())


def refused() -> list[Any]:
    foreign = [
        pytest.param(getattr(torch.optim, name), "Responses are known for AdamW", id=name)
        for name in ("Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adafactor", "Rprop", "ASGD")
    ]
    own = [
        pytest.param(lambda some: Adafactor(some), "relative_step=True.* relative_step=False", id="relative steps"),
        pytest.param(
            lambda some: Adafactor(some, lr=RATE, relative_step=False), "scale_parameter=True", id="scaled by weights"
        ),
        pytest.param(lambda some: torch.optim.AdamW(some, maximize=True), "maximize=True of AdamW", id="maximize"),
    ]
    return foreign + own


@pytest.mark.parametrize(("make", "message"), refused())
def test_other_optimizers_are_refused_with_a_cure(make: Make, message: str) -> None:
    check_refusal(make, message)


def test_step_that_a_fused_optimizer_skips_has_rate_zero() -> None:
    """In float16 the scaler calls the step of a fused optimizer whatever it found, and the kernel leaves it out."""
    layer = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, fused=True)
    parameters = TrackedParameters.of(layer, "trainable")
    preconditioner = Preconditioner.of(optimizer, layer, parameters)
    check = StepCheck(optimizer, preconditioner, dict(layer.named_parameters()))
    scaler, rates, messages = torch.amp.GradScaler("cpu", init_scale=2.0), [], []

    def before(*_: Any) -> None:
        rates.append(preconditioner.learning_rate(optimizer))
        messages.append(check.gradients(1.0, scaler.get_scale()))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: messages.append(check.step()))
    diagonals = []
    for size in (float("inf"), 1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(size * layer(torch.ones(4)).square().sum()).backward()
        check.after_backward()
        scaler.step(optimizer)
        scaler.update()
        diagonals.append(preconditioner.diagonal(optimizer, layer, parameters))
    assert rates == [0.0, RATE, 0.0, RATE]
    assert messages == [None] * 8
    assert float(diagonals[0].max()) < 1e-9  # no step was taken yet
    assert float(diagonals[1].min()) > 1e-3
    assert torch.equal(diagonals[2], diagonals[1])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_trainer_option_is_recorded_in_the_bank(tmp_path: Path, optim: str) -> None:
    check_recorded_in_the_bank(tmp_path, optim)
