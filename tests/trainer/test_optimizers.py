"""Optimizers that are used with LoRA: under small steps the scores of all rows sum to what training changed."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.optimization import Adafactor

from hf_fwdattr import ResponseBank, ResponseCallback
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.query.batch import batch_scores
from hf_fwdattr.trainer import optimizer as optimizers
from hf_fwdattr.trainer.adafactor import UpdateClipping, clipping_factor, inverse_root
from hf_fwdattr.trainer.optimizer import Preconditioner
from hf_fwdattr.trainer.optimizer_state import adam_moments
from hf_fwdattr.trainer.step_checks import StepCheck
from tests.helpers.cases import CONTEXT, VOCABULARY, padded
from tests.helpers.reference import agree
from tests.helpers.runs import config, fine_tune, losses, training_set


Make = Callable[[list[Any]], torch.optim.Optimizer]
RATE = 5e-6


PAGED = "ignore:Paged optimizers are not supported on CPU:UserWarning"


def low_bit(library: str, name: str, **settings: Any) -> Make:
    """An optimizer of a library that need not be installed."""

    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        kind = getattr(importlib.import_module(f"{library}.optim"), name)
        optimizer: torch.optim.Optimizer = kind(weights, lr=RATE, **settings)
        return optimizer

    return make


def case(library: str, name: str, *more: Any, **settings: Any) -> Any:
    label = " ".join([library, name, *(f"{key}={value}" for key, value in settings.items())])
    return pytest.param(low_bit(library, name, **settings), *more, id=label, marks=needs(library))


def needs(library: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def adafactor(weights: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    return Adafactor(weights, lr=RATE, relative_step=False, scale_parameter=False, **settings)


SHORT: dict[str, Any] = dict(betas=(0.0, 0.99))  # without a first moment the weights get what the rows pushed
OPTIMIZERS: list[Any] = [
    pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, **SHORT), id="AdamW"),
    pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, fused=True, **SHORT), id="AdamW, fused"),
    pytest.param(adafactor, id="Adafactor"),
    case("bitsandbytes", "AdamW", optim_bits=32, **SHORT),
    case("bitsandbytes", "AdamW", optim_bits=8, **SHORT),
    case("bitsandbytes", "PagedAdamW8bit", **SHORT),
    case("torchao", "AdamW8bit", **SHORT),
    case("torchao", "AdamWFp8", **SHORT),
    case("torchao", "AdamW4bit", **SHORT),
]
LOW_BIT: list[Any] = [
    case("bitsandbytes", "AdamW8bit"), case("torchao", "AdamW8bit"), case("torchao", "AdamWFp8"),
    case("torchao", "AdamW4bit"),
]  # fmt: skip
CHECKED: list[Any] = [
    pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, fused=True), id="AdamW, fused"),
    pytest.param(lambda some: torch.optim.AdamW(some, lr=RATE, amsgrad=True), id="AdamW, amsgrad"),
    pytest.param(adafactor, id="Adafactor"),
    pytest.param(lambda some: adafactor(some, weight_decay=0.1, beta1=0.9), id="Adafactor with a first moment"),
    case("bitsandbytes", "PagedAdamW32bit"), case("bitsandbytes", "Adam8bit", weight_decay=0.1), *LOW_BIT,
]  # fmt: skip
# What `TrainingArguments(optim=...)` calls those whose library is installed.
NAMED = [
    name for library, names in {"torchao": ["adamw_torch_8bit"], "bitsandbytes": ["adamw_bnb_8bit"]}.items()
    if importlib.util.find_spec(library) is not None for name in names
]  # fmt: skip


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step, which takes a minute here and changes no number."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


def network() -> tuple[Any, list[nn.Parameter]]:
    """A GPT-2 whose MLPs are trained: matrices of 4,096 weights, the least of which 8 bits are kept."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ))  # fmt: skip
    for name, weight in model.named_parameters():
        weight.requires_grad_(".mlp." in name and name.endswith("weight"))
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def changed_and_scored(folder: Path, make: Make, **how: Any) -> tuple[Tensor, Tensor, ResponseCallback]:
    """(what training changed of a few rows' log-likelihood, the sums of their scores, the callback)."""
    model, weights = network()
    rows: Any = training_set()
    some = [rows[index] for index in range(4)]
    before = losses(copy.deepcopy(model).double(), some)
    settings = config(parameters="trainable", segments=4)  # one a step: each has the diagonal that it was taken with
    callback = fine_tune(
        folder, model, settings, rows, optimizers=(make(weights), None), num_train_epochs=1, max_grad_norm=0, **how
    )
    assert callback.bank is not None
    changed = before - losses(copy.deepcopy(model.eval()).double(), some)
    scored = [batch_scores(model, callback.bank, padded([row])).sum() for row in some]
    return changed, torch.stack(scored).to(changed), callback


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings(PAGED)
def test_scores_sum_to_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setattr(optimizers, "FEEDBACK", 0.0)  # a derivative, of which Adam's step takes a share back
    changed, scored, callback = changed_and_scored(tmp_path, make)
    assert callback.recorder.record.notes == []
    four_bits = callback.recorder.preconditioner.kind.endswith("4bit")  # sixteen steps up to a block's largest square
    agree(scored, changed, 0.1 if four_bits else 0.01)


def test_fused_steps_give_the_same_scores(tmp_path: Path) -> None:
    _, fused, _ = changed_and_scored(tmp_path / "fused", lambda some: torch.optim.AdamW(some, fused=True))
    _, plain, _ = changed_and_scored(tmp_path / "plain", lambda some: torch.optim.AdamW(some, fused=False))
    agree(fused, plain, 1e-4)


class Steps:
    """An optimizer over one matrix of 4,096 weights, whose steps are checked without a Trainer."""

    def __init__(self, make: Make):
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64, bias=False)
        self.optimizer = make([self.layer.weight])
        parameters = TrackedParameters.of(self.layer, "trainable")
        self.preconditioner = Preconditioner.of(self.optimizer, self.layer, parameters)
        self.check = StepCheck(self.optimizer, self.preconditioner, dict(self.layer.named_parameters()))
        self.diagonal = lambda: self.preconditioner.diagonal(self.optimizer, self.layer, parameters).view(64, 64)

    def take(self, size: float = 1.0) -> str | None:
        """Take a step with a random gradient, multiply it with `size`, and check it."""
        weight = self.layer.weight
        sizes = torch.arange(64)
        weight.grad = torch.randn_like(weight) * ((sizes + sizes[:, None]) % 64 + 1) / 64  # of all sizes in each block
        before = weight.detach().clone()
        assert self.check.gradients(1.0, 1.0) is None
        self.optimizer.step()
        self.check.record_update_clipping()
        with torch.no_grad():
            weight.copy_(before + size * (weight - before))
        return self.check.step()


@pytest.mark.parametrize("make", CHECKED)
@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings(PAGED)
def test_step_is_checked_against_the_state(make: Make) -> None:
    """With a first moment that lasts, which is rounded to the bits of its state between steps."""
    steps = Steps(make)
    assert [steps.take() for _ in range(12)] == [None] * 12
    message = steps.take(size=1.02)
    assert message is not None
    assert message.startswith("the step of weight: the weights moved by")


@pytest.mark.parametrize("make", LOW_BIT)
@pytest.mark.usefixtures("eager")
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
@pytest.mark.usefixtures("eager")
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


def test_weight_without_a_gradient_has_a_bounded_diagonal() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = adafactor([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert float(inverse_root(optimizer.state[weight]).max()) <= 1e8


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
    libraries = [
        *(case("bitsandbytes", name, "Responses are known") for name in ("Lion8bit", "AdEMAMix8bit", "RMSprop8bit")),
        case("torchao", "Adam8bit", "weight_decay=0.1 of Adam", weight_decay=0.1),
    ]
    return foreign + own + libraries


@pytest.mark.parametrize(("make", "message"), refused())
def test_other_optimizers_are_refused_with_a_cure(make: Make, message: str) -> None:
    layer = nn.Linear(3, 3, bias=False)
    with pytest.raises(UnsupportedError, match=message):
        Preconditioner.of(make([layer.weight]), layer, TrackedParameters.of(layer, "trainable"))


@needs("bitsandbytes")
@pytest.mark.parametrize("option", [{"max_unorm": 1.0}, {"skip_zeros": True}, {"percentile_clipping": 5}])
def test_options_beside_the_groups_of_bitsandbytes_are_refused(option: dict[str, Any]) -> None:
    optimizer: Any = low_bit("bitsandbytes", "AdamW8bit")([nn.Parameter(torch.zeros(3, 3))])
    vars(optimizer.args).update(option)
    layer = nn.Linear(3, 3, bias=False)
    optimizer.param_groups[0]["params"] = [layer.weight]
    with pytest.raises(UnsupportedError, match=f"{next(iter(option))}=.* of AdamW8bit"):
        Preconditioner.of(optimizer, layer, TrackedParameters.of(layer, "trainable"))


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


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", *NAMED])
@pytest.mark.usefixtures("eager")
def test_trainer_option_is_recorded_in_the_bank(tmp_path: Path, optim: str) -> None:
    model, _ = network()
    quick = config(parameters="trainable", segments=1, directions=4, gradient_predictor=False, self_check=2)
    callback = fine_tune(tmp_path, model, quick, optim=optim, num_train_epochs=1)
    assert callback.bank is not None
    names = {"adamw_torch_fused": "adamw", "adamw_torch_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit"}
    assert callback.bank.manifest.optimizer == names.get(optim, optim)
    assert callback.bank.manifest.notes == []
    quality = ResponseBank.from_pretrained(callback.bank.folder).manifest.quality  # written after the bank was opened
    assert quality["self_check"]["left_out"] == 2
