"""VJPs of norms, attention, rotary positions and activations, against autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr.layers.attention import apply_rotary, attention_weights, softmax_attention_vjp
from hf_fwdattr.layers.mlp import elementwise_derivative
from hf_fwdattr.layers.norm import NormForm
from tests.helpers.reference import agree


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autograd_vjp(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    inputs = [value.clone().requires_grad_(True) for value in inputs]
    return list(torch.autograd.grad(function(*inputs), inputs, gradient))


@pytest.mark.parametrize("centred", [True, False])
def test_norm_vjp_equals_autograd(centred: bool) -> None:
    def norm(x: Tensor) -> Tensor:
        functional = nn.functional
        return functional.layer_norm(x, (7,), gain, eps=1e-3) if centred else functional.rms_norm(x, (7,), gain, 1e-3)

    x, gain, gradient = random(2, 3, 7), random(7, seed=1), random(2, 3, 7, seed=2)
    (expected,) = autograd_vjp(norm, [x], gradient)
    agree(NormForm(centred, gain, 1e-3).vjp(x, gradient), expected, 1e-12)


@pytest.mark.parametrize("kind", ["causal", "boolean", "added"])
def test_attention_vjp_equals_autograd(kind: str) -> None:
    query, key, value, gradient = (random(2, 2, 5, 3, seed=seed) for seed in range(4))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    if kind != "causal":
        allowed = allowed & torch.tensor([True, True, True, True, False])
    mask = {"causal": None, "boolean": allowed, "added": torch.zeros(5, 5).double().masked_fill(~allowed, -1e9)}[kind]

    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=0.7)

    weights = attention_weights(query, key, 0.7, mask)
    agree(weights @ value, forward(query, key, value), 1e-12)
    gradients = softmax_attention_vjp(query, key, value, weights, 0.7, gradient)
    for actual, expected in zip(gradients, autograd_vjp(forward, [query, key, value], gradient), strict=True):
        agree(actual, expected, 1e-12)


def test_inverse_rotation_is_the_transpose() -> None:
    x, gradient, angle = random(1, 2, 4, 6), random(1, 2, 4, 6, seed=1), random(1, 1, 4, 3, seed=2)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    (expected,) = autograd_vjp(lambda x: apply_rotary(x, cos, sin), [x], gradient)
    agree(apply_rotary(gradient, cos, -sin), expected, 1e-12)


@pytest.mark.parametrize("function", [nn.functional.silu, nn.GELU("tanh"), torch.relu])
def test_elementwise_derivative_equals_autograd(function: Callable[[Tensor], Tensor]) -> None:
    x = random(3, 4)
    (expected,) = autograd_vjp(function, [x], torch.ones_like(x))
    agree(elementwise_derivative(function, x), expected, 1e-12)
