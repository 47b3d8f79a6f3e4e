"""Fused activations."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_fwdattr.models.compat import fused_activations
from tests.helpers.reference import agree


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_fused_activation_is_the_same_function(name: str) -> None:
    model = nn.Sequential(ACT2FN[name], ACT2FN["silu"])
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    plain = model(x)
    with fused_activations(model):
        assert "forward" in vars(model[0])
        assert "forward" not in vars(model[1])
        agree(model(x), plain, 1e-7)
    assert "forward" not in vars(model[0])
    assert torch.equal(model(x), plain)


def test_activations_are_restored_after_an_error() -> None:
    model = nn.Sequential(ACT2FN["gelu_new"])
    with pytest.raises(RuntimeError, match="stop"), fused_activations(model):
        raise RuntimeError("stop")
    assert "forward" not in vars(model[0])
