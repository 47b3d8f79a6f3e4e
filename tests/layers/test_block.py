"""When two tensors are equal up to rounding."""

import torch

from hf_fwdattr.layers.block import same


def test_a_position_with_huge_activations_hides_no_other() -> None:
    one = torch.ones(1, 3, 4)
    one[0, 0] = 1e6
    other = one.clone()
    assert same(one, other * (1 + 1e-4))
    other[0, 2] = 1.1
    assert not same(one, other)


def test_half_precision_rounds_more() -> None:
    one = torch.ones(2, 4)
    assert not same(one, one * 1.01)
    assert same(one.bfloat16(), one * 1.01)
    assert not same(one.bfloat16(), one * 1.1)


def test_shapes_are_compared() -> None:
    assert not same(torch.ones(2, 4), torch.ones(1, 4))
