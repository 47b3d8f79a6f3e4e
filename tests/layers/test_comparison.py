"""Comparison of tensors up to rounding."""

import torch

from hf_fwdattr.layers.comparison import nearly_equal


def test_huge_activations_at_one_position_hide_no_other() -> None:
    one = torch.ones(1, 3, 4)
    one[0, 0] = 1e6
    other = one.clone()
    assert nearly_equal(one, other * (1 + 1e-4))
    other[0, 2] = 1.1
    assert not nearly_equal(one, other)


def test_tolerance_is_larger_in_half_precision() -> None:
    one = torch.ones(2, 4)
    assert not nearly_equal(one, one * 1.01)
    assert nearly_equal(one.bfloat16(), one * 1.01)
    assert not nearly_equal(one.bfloat16(), one * 1.1)


def test_tensors_of_different_shapes_are_unequal() -> None:
    assert not nearly_equal(torch.ones(2, 4), torch.ones(1, 4))
