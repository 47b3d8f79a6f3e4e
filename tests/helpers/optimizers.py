"""Fine-tunes and single steps under an optimizer, and what must hold of its scores and steps."""

import copy
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
from hf_fwdattr.trainer.optimizer import Preconditioner
from hf_fwdattr.trainer.step_checks import StepCheck
from tests.helpers.cases import CONTEXT, VOCABULARY, padded
from tests.helpers.reference import agree
from tests.helpers.runs import config, fine_tune, losses, training_set


Make = Callable[[list[Any]], torch.optim.Optimizer]
RATE = 5e-6
SHORT: dict[str, Any] = dict(betas=(0.0, 0.99))  # without a first moment the weights get what the rows pushed


def adafactor(weights: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    return Adafactor(weights, lr=RATE, relative_step=False, scale_parameter=False, **settings)


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


def check_scores_sum_to_the_change(folder: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setattr(optimizers, "FEEDBACK", 0.0)  # a derivative, of which Adam's step takes a share back
    changed, scored, callback = changed_and_scored(folder, make)
    assert callback.recorder.record.notes == []
    four_bits = callback.recorder.preconditioner.kind.endswith("4bit")  # sixteen steps up to a block's largest square
    agree(scored, changed, 0.1 if four_bits else 0.01)


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


def check_steps_against_the_state(make: Make) -> None:
    """With a first moment that lasts, which is rounded to the bits of its state between steps."""
    steps = Steps(make)
    assert [steps.take() for _ in range(12)] == [None] * 12
    message = steps.take(size=1.02)
    assert message is not None
    assert message.startswith("the step of weight: the weights moved by")


def check_refusal(make: Make, message: str) -> None:
    layer = nn.Linear(3, 3, bias=False)
    with pytest.raises(UnsupportedError, match=message):
        Preconditioner.of(make([layer.weight]), layer, TrackedParameters.of(layer, "trainable"))


def check_recorded_in_the_bank(folder: Path, optim: str) -> None:
    """A Trainer makes the optimizer by its name, and the self-check trains with it again."""
    model, _ = network()
    quick = config(parameters="trainable", segments=1, directions=4, gradient_predictor=False, self_check=2)
    callback = fine_tune(folder, model, quick, optim=optim, num_train_epochs=1)
    assert callback.bank is not None
    names = {"adamw_torch_fused": "adamw", "adamw_torch_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit"}
    assert callback.bank.manifest.optimizer == names.get(optim, optim)
    assert callback.bank.manifest.notes == []
    quality = ResponseBank.from_pretrained(callback.bank.folder).manifest.quality  # written after the bank was opened
    assert quality["self_check"]["left_out"] == 2
