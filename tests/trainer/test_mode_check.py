"""The comparison of both modes takes two forward passes, and more only where layers draw at random."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.likelihood import Objective
from hf_fwdattr.trainer.mode_check import refuse_other_training_mode


class Layer(nn.Module):
    """Logits that are moved while training, by what `noise` returns; counts its passes."""

    def __init__(self, noise: Any):
        super().__init__()
        self.noise, self.passes, self.dropout = noise, 0, nn.Dropout(0.5)

    def forward(self, logits: Tensor) -> Tensor:
        self.passes += 1
        return self.dropout(logits) + (self.noise() if self.training else 0.0)


OBJECTIVE = Objective("custom", lambda model, batch: (model(batch["logits"]), batch["labels"]))
BATCH = {"logits": torch.eye(3)[None], "labels": torch.arange(3)[None]}


@pytest.mark.parametrize(
    ("noise", "passes"),
    [
        (lambda: 0.0, 2),
        (lambda: 1e-4 * torch.rand(3), 4),
        (lambda: 1e-4 * float(np.random.rand()), 4),
        (lambda: 1e-4 * random.random(), 4),
    ],
    ids=["no noise", "torch", "NumPy", "Python"],
)
def test_passes_are_repeated_where_something_was_drawn(noise: Any, passes: int) -> None:
    model = Layer(noise).eval()
    refuse_other_training_mode(model, OBJECTIVE, BATCH)
    assert model.passes == passes
    assert not model.training
    assert model.dropout.p == 0.5


def test_rare_draws_are_seen_in_a_later_pass() -> None:
    model: Layer = Layer(lambda: torch.rand(()) * (model.passes == 4) * torch.eye(3)[0])
    model.eval()
    with pytest.raises(UnsupportedError, match="in training mode its logits differ by"):
        refuse_other_training_mode(model, OBJECTIVE, BATCH)


def test_other_network_without_draws_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="in training mode its logits differ by"):
        refuse_other_training_mode(Layer(lambda: torch.eye(3)[0]).eval(), OBJECTIVE, BATCH)
