"""Predicted derivatives by groups of weights: they sum to the derivatives, on one rank or several."""

import torch

from hf_fwdattr.gradients.predicted_derivatives import column_groups, grouped_derivatives
from tests.helpers.reference import agree


SIZES = [4, 1, 7, 3, 9]


def test_groups_are_whole_weights_in_order() -> None:
    assert column_groups(SIZES) == [slice(0, 4), slice(4, 5), slice(5, 12), slice(12, 15), slice(15, 24)]
    assert column_groups(SIZES, 2) == [slice(0, 5), slice(5, 24)]
    assert column_groups(SIZES, 1) == [slice(0, 24)]


def test_contributions_of_groups_sum_to_the_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, directions = (torch.randn(n, sum(SIZES), generator=generator).double() for n in (3, 5))
    groups = column_groups(SIZES, 3)
    parts = grouped_derivatives(gradients, directions, groups)
    assert parts.shape == (3, 15)
    agree(parts.view(3, 3, 5).sum(1), gradients @ directions.T, 1e-12)
    agree(parts[:, 5:10], gradients[:, groups[1]] @ directions[:, groups[1]].T, 1e-12)
    split = [
        grouped_derivatives(gradients[:, own], directions[:, own], groups, own.start)
        for own in (slice(0, 10), slice(10, 24))
    ]
    agree(split[0] + split[1], parts, 1e-12)
