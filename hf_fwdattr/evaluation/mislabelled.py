"""Finding mislabelled rows: the area under the ROC curve of a suspicion."""

import torch
from scipy.stats import rankdata
from torch import Tensor

from .interval import finite


def mislabelled_auc(suspicion: Tensor, mislabelled: Tensor) -> float:
    """Chance that a mislabelled row is more suspect than a right one; equal suspicion counts half.

    Args:
        suspicion (`Tensor`): (rows,), larger is more suspect: a row's score for its own label (it alone explains it),
            or minus its mean score for held-out queries (it harms them).
        mislabelled (`Tensor`): (rows,) booleans.

    Raises:
        ValueError: other shapes, values that are not finite, or rows of one kind only.
    """
    if suspicion.ndim != 1 or suspicion.shape != mislabelled.shape or mislabelled.dtype != torch.bool:
        raise ValueError(
            f"suspicion {tuple(suspicion.shape)} and mislabelled {tuple(mislabelled.shape)} {mislabelled.dtype}: both "
            "must be (rows,), the second booleans"
        )
    finite(suspicion=suspicion)
    wrong = int(mislabelled.sum())
    right = len(mislabelled) - wrong
    if not wrong or not right:
        raise ValueError(f"{wrong} mislabelled and {right} right rows: the area needs both kinds")
    ranks = torch.from_numpy(rankdata(suspicion.double().numpy()))
    return (float(ranks[mislabelled].sum()) - wrong * (wrong + 1) / 2) / (wrong * right)
