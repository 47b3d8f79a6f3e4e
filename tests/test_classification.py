"""The classification measurements, in the small: no download, a few images, a few retrainings."""

from functools import partial
from pathlib import Path

import smollm2_sources
import torch
from classification import bank_scores, batches, fine_tune, losses
from datasets import Dataset
from torch import Tensor, nn

from hf_fwdattr.evaluation.designs import random_halves
from hf_fwdattr.evaluation.metrics import lds
from hf_fwdattr.evaluation.retrain import retrain
from tests.gradients.test_other_layers import vit
from tests.helpers.reference import agree
from tests.query.test_batch import images


RUN = dict(per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2)


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return vit()


def train(kept: Tensor, seed: int, dataset: Dataset, test: Dataset) -> Tensor:
    return losses(fine_tune(fresh(), dataset.select(kept.nonzero().flatten().tolist()), seed, **RUN), test)


def test_a_bank_of_images_foretells_retraining(tmp_path: Path) -> None:
    dataset, test = images(18), images(6, seed=5)
    settings = {"parameters": "trainable", "directions": "exact"}
    scores, own, cost, model = bank_scores(fresh(), dataset, test, 0, settings, own=True, **RUN)
    assert scores.shape == (6, 18)
    assert own.shape == (18,)
    assert cost["directions"] == 18
    halves = random_halves(18, 10)
    outcomes = retrain(partial(train, dataset=dataset, test=test), halves, [1], tmp_path, quiet=True, name="images")
    assert lds(scores, halves, outcomes.mean(0)).mean > 0.3
    agree(losses(model, test), torch.cat([losses(model, test.select([i])) for i in range(6)]), 1e-5)
    assert sum(len(batch["labels"]) for batch in batches(dataset, size=7)) == 18


def test_agreement_of_sources_is_one_for_the_truth_and_turns_with_its_sign() -> None:
    real = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, turned = smollm2_sources.agreement(2 * real, real), smollm2_sources.agreement(-real, real)
    assert exact == {
        "Spearman, all pairs": 1.0, "per publisher": 1.0, "per query": 1.0, "Pearson": exact["Pearson"], "slope": 0.5,
        "greatest loser found": 1.0,
    }  # fmt: skip
    assert turned["Spearman, all pairs"] == -1.0
    assert turned["slope"] == -1.0
