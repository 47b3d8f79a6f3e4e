"""Optimizers of torchao and bitsandbytes; `test_optimizers.py` runs these in a process that has both libraries.

Only there, as PEFT imports them wherever they are found, and they write to stderr then.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.trainer.optimizer import Preconditioner
from hf_fwdattr.trainer.optimizer_state import adam_moments
from tests.helpers.optimizers import (
    RATE,
    SHORT,
    Make,
    Steps,
    check_recorded_in_the_bank,
    check_refusal,
    check_scores_sum_to_the_change,
    check_steps_against_the_state,
)
from tests.helpers.reference import agree


pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


def low_bit(library: str, name: str, **settings: Any) -> Make:
    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        kind = getattr(importlib.import_module(f"{library}.optim"), name)
        optimizer: torch.optim.Optimizer = kind(weights, lr=RATE, **settings)
        return optimizer

    return make


def case(library: str, name: str, *more: Any, **settings: Any) -> Any:
    label = " ".join([library, name, *(f"{key}={value}" for key, value in settings.items())])
    return pytest.param(low_bit(library, name, **settings), *more, id=label)


OPTIMIZERS: list[Any] = [
    case("bitsandbytes", "AdamW", optim_bits=32, **SHORT), case("bitsandbytes", "AdamW", optim_bits=8, **SHORT),
    case("bitsandbytes", "PagedAdamW8bit", **SHORT), case("torchao", "AdamW8bit", **SHORT),
    case("torchao", "AdamWFp8", **SHORT), case("torchao", "AdamW4bit", **SHORT),
]  # fmt: skip
LOW_BIT: list[Any] = [
    case("bitsandbytes", "AdamW8bit"), case("torchao", "AdamW8bit"), case("torchao", "AdamWFp8"),
    case("torchao", "AdamW4bit"),
]  # fmt: skip
REFUSED: list[Any] = [
    *(case("bitsandbytes", name, "Responses are known") for name in ("Lion8bit", "AdEMAMix8bit", "RMSprop8bit")),
    case("torchao", "Adam8bit", "weight_decay=0.1 of Adam", weight_decay=0.1),
]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step, which takes a minute here and changes no number."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_scores_sum_to_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    check_scores_sum_to_the_change(tmp_path, monkeypatch, make)


@pytest.mark.parametrize(
    "make",
    [case("bitsandbytes", "PagedAdamW32bit"), case("bitsandbytes", "Adam8bit", weight_decay=0.1), *LOW_BIT],
)
def test_step_is_checked_against_the_state(make: Make) -> None:
    check_steps_against_the_state(make)


@pytest.mark.parametrize("make", LOW_BIT)
def test_low_bit_moments_are_those_of_torch(make: Make) -> None:
    steps, plain = Steps(make), Steps(lambda some: torch.optim.AdamW(some, lr=RATE))
    for one in (steps, plain):
        torch.manual_seed(1)
        for _ in range(5):
            one.take()
    moments, expected = (
        adam_moments(one.optimizer.state[one.layer.weight], one.optimizer.param_groups[0]) for one in (steps, plain)
    )
    tolerance = {"8bit": 0.03, "fp8": 0.05, "4bit": 0.3}[steps.preconditioner.kind.partition("_")[2]]
    agree(moments.first.double(), expected.first.double(), tolerance)
    agree(moments.second.double(), expected.second.double(), tolerance)
    assert moments.steps == expected.steps == 5


@pytest.mark.parametrize("make", LOW_BIT)
def test_second_moment_that_is_rounded_to_zero_stays_finite(make: Make) -> None:
    """A weight with a gradient far below its neighbours': the next step divides by no zero, and neither does D."""
    steps = Steps(make)
    weight = steps.layer.weight
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        weight.grad[:, ::2] = 1e-6
        steps.optimizer.step()
    state, group = steps.optimizer.state[weight], steps.optimizer.param_groups[0]
    if "state2" in state:  # bitsandbytes rounds up on a CPU, not on a GPU
        state["state2"][:, ::2] = 0
    exact = float(adam_moments(state, group, exact=True).second.min())
    assert exact == 0.0 or steps.preconditioner.kind.endswith("4bit")  # whose table has no zero
    least = float(adam_moments(state, group).second.min())
    assert 1e-11 < least < 1e-3
    assert float(steps.diagonal().max()) < 1e5


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_others_are_refused_with_a_cure(make: Make, message: str) -> None:
    check_refusal(make, message)


@pytest.mark.parametrize("option", [{"max_unorm": 1.0}, {"skip_zeros": True}, {"percentile_clipping": 5}])
def test_options_beside_the_groups_of_bitsandbytes_are_refused(option: dict[str, Any]) -> None:
    optimizer: Any = low_bit("bitsandbytes", "AdamW8bit")([nn.Parameter(torch.zeros(3, 3))])
    vars(optimizer.args).update(option)
    layer = nn.Linear(3, 3, bias=False)
    optimizer.param_groups[0]["params"] = [layer.weight]
    with pytest.raises(UnsupportedError, match=f"{next(iter(option))}=.* of AdamW8bit"):
        Preconditioner.of(optimizer, layer, TrackedParameters.of(layer, "trainable"))


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_bnb_8bit"])
def test_trainer_option_is_recorded_in_the_bank(tmp_path: Path, optim: str) -> None:
    check_recorded_in_the_bank(tmp_path, optim)
