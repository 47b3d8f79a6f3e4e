import pytest
import torch
from scipy.stats import mannwhitneyu

from hf_fwdattr.evaluation.metrics import mislabelled_auc


def test_by_hand() -> None:
    """Mislabelled 3 and 1, right 2 and 0: of four pairs three in order. A tie counts half."""
    suspicion, flipped = torch.tensor([3.0, 1, 2, 0]), torch.tensor([1, 1, 0, 0]).bool()
    assert mislabelled_auc(suspicion, flipped) == pytest.approx(0.75)
    assert mislabelled_auc(torch.tensor([3.0, 2, 2, 0]), flipped) == pytest.approx(0.875)
    assert mislabelled_auc(torch.ones(4), flipped) == pytest.approx(0.5)


def test_it_is_scipys_and_the_slow_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    flipped = torch.rand(80, generator=generator) < 0.2
    suspicion = (torch.randn(80, generator=generator) + flipped).mul(3).round()  # with ties
    value = mislabelled_auc(suspicion, flipped)
    wrong, right = suspicion[flipped], suspicion[~flipped]
    assert value == pytest.approx(mannwhitneyu(wrong, right).statistic / (len(wrong) * len(right)))
    pairs = (wrong[:, None] > right).double() + 0.5 * (wrong[:, None] == right)
    assert value == pytest.approx(float(pairs.mean()))
    assert mislabelled_auc(-suspicion, flipped) == pytest.approx(1 - value)


def test_what_cannot_be_is_refused() -> None:
    suspicion, flipped = torch.rand(4), torch.tensor([1, 0, 0, 0]).bool()
    for bad in ((suspicion[None], flipped), (suspicion, flipped[:3]), (suspicion, flipped.float())):
        with pytest.raises(ValueError, match="must be"):
            mislabelled_auc(*bad)
    for all_alike in (torch.zeros(4).bool(), torch.ones(4).bool()):
        with pytest.raises(ValueError, match="both kinds"):
            mislabelled_auc(suspicion, all_alike)
    with pytest.raises(ValueError, match="suspicion hold"):
        mislabelled_auc(suspicion / 0, flipped)
