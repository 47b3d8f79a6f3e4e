import pytest
import torch

from hf_fwdattr.evaluation.agreement import Interval


def test_it_is_the_95_percent_interval_of_the_mean() -> None:
    """For many values the bootstrap is the normal interval: 1.96 standard errors on either side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3.0
    found = Interval.of(values)
    error = float(values.std()) / 20
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_without_two_different_values_it_has_no_width() -> None:
    for values in (torch.tensor([2.0]), torch.tensor([2.0, 2.0, 2.0])):
        found = Interval.of(values)
        assert (found.low, found.mean, found.high) == (2.0, 2.0, 2.0)
