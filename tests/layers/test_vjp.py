"""Written-out derivatives against autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr.layers.attention import apply_rotary, attention, attention_weights
from hf_fwdattr.layers.mlp import slope
from hf_fwdattr.layers.norm import layer_norm, rms_norm
from tests.helpers.reference import agree


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pulled(function: Callable[..., Tensor], inputs: list[Tensor], error: Tensor) -> list[Tensor]:
    """What autograd says."""
    inputs = [value.clone().requires_grad_(True) for value in inputs]
    return list(torch.autograd.grad(function(*inputs), inputs, error))


def test_norms() -> None:
    x, gain, error = random(2, 3, 7), random(7, seed=1), random(2, 3, 7, seed=2)
    (expected,) = pulled(lambda x: nn.functional.layer_norm(x, (7,), gain, None, 1e-3), [x], error)
    agree(layer_norm(x, gain, error, 1e-3), expected, 1e-12)
    (expected,) = pulled(lambda x: nn.functional.rms_norm(x, (7,), gain, 1e-3), [x], error)
    agree(rms_norm(x, gain, error, 1e-3), expected, 1e-12)


@pytest.mark.parametrize("kind", ["causal", "boolean", "added"])
def test_attention(kind: str) -> None:
    query, key, value, error = (random(2, 2, 5, 3, seed=seed) for seed in range(4))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    if kind != "causal":
        allowed = allowed & torch.tensor([True, True, True, True, False])
    mask = {"causal": None, "boolean": allowed, "added": torch.zeros(5, 5).double().masked_fill(~allowed, -1e9)}[kind]

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=0.7)

    weights = attention_weights(query, key, 0.7, mask)
    agree(weights @ value, forward(query, key, value), 1e-12)
    found = attention(query, key, value, weights, 0.7, error)
    for mine, expected in zip(found, pulled(forward, [query, key, value], error), strict=True):
        agree(mine, expected, 1e-12)


def test_turning_back_is_the_transpose_of_turning() -> None:
    x, error, angle = random(1, 2, 4, 6), random(1, 2, 4, 6, seed=1), random(1, 1, 4, 3, seed=2)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    (expected,) = pulled(lambda x: apply_rotary(x, cos, sin), [x], error)
    agree(apply_rotary(error, cos, -sin), expected, 1e-12)


@pytest.mark.parametrize("function", [nn.functional.silu, nn.GELU("tanh"), torch.relu])
def test_slopes(function: Callable[[Tensor], Tensor]) -> None:
    x = random(3, 4)
    (expected,) = pulled(function, [x], torch.ones_like(x))
    agree(slope(function, x), expected, 1e-12)
