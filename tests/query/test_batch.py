"""Queries that are not text: a fine-tune of an image classifier, its bank, and scores of batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, default_data_collator

from hf_fwdattr import ResponseBank, ResponseCallback
from hf_fwdattr.bank.hashing import content_hash
from hf_fwdattr.errors import MismatchError, QueryError, UnsupportedError
from hf_fwdattr.models.likelihood import SEQUENCE_CLASSIFICATION
from hf_fwdattr.query.batch import batch_scores
from tests.gradients.test_other_layers import CLASSES, resnet, vit
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import arguments, ask, config, fine_tune, queries, saved_adapter


def images(rows: int, seed: int = 0) -> Dataset:
    """Return noise images whose mean depends on their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    pixels = torch.randn(rows, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()}).with_format("torch")


def trained(folder: Path, model: nn.Module, dataset: Dataset, **changes: Any) -> ResponseCallback:
    """Train on images with the callback, with every weight tracked."""
    settings = {"parameters": "trainable", "source_column": None} | changes
    callback = ResponseCallback(config(**settings))
    torch.manual_seed(0)
    Trainer(
        model=model, args=arguments(folder), train_dataset=dataset, data_collator=default_data_collator,
        callbacks=[callback],
    ).train()  # fmt: skip
    return callback


def test_image_classifier_scores_equal_reverse_mode(tmp_path: Path) -> None:
    """Scores of a batch are minus the loss gradients of its queries times the responses in the bank."""
    torch.manual_seed(0)
    model, dataset = vit(), images(9)
    bank = trained(tmp_path, model, dataset).bank
    assert bank is not None
    assert bank.manifest.objective == "sequence-classification"
    model.eval()
    batch = default_data_collator([images(4, seed=5)[i] for i in range(4)])
    result = batch_scores(model, bank, batch)
    parameters = bank.check_model(model)
    responses = torch.cat([block for _, _, block in bank.coordinates()]) @ bank.directions()
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    gradients = torch.stack([row_gradient(model, parameters, SEQUENCE_CLASSIFICATION, single) for single in singles])
    agree(result, -gradients @ responses.T, 1e-4)
    agree(batch_scores(model, bank, batch, readout="difference"), result, 1e-2)
    # Rows are identified by their pixels and labels.
    hashes = [content_hash(default_data_collator([dataset[i]]), bank.salt) for i in range(9)]
    bank.check_rows(hashes)
    other = dataset.with_format(None).to_dict()
    other["pixel_values"][4][0][0][0] += 0.5
    changed = Dataset.from_dict(other).with_format("torch")
    with pytest.raises(MismatchError, match="row 4 of the dataset"):
        bank.check_rows([content_hash(default_data_collator([changed[i]]), bank.salt) for i in range(9)])


def test_batch_scores_of_a_language_model_equal_the_pipelines(tmp_path: Path) -> None:
    model = saved_adapter(tmp_path / "adapter").eval()
    bank = ResponseBank.from_pretrained(tmp_path / "adapter")
    for query in queries(3):
        batch = {key: torch.tensor([query[key]]) for key in ("input_ids", "labels")}
        agree(batch_scores(model, bank, batch), ask(model, bank).scores([query]), 1e-5)


def test_batches_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vit()
    bank = trained(tmp_path, model, images(6), directions=2).bank
    assert bank is not None
    model.eval()
    pixels = torch.zeros(2, 1, 8, 8)
    with pytest.raises(QueryError, match="no 'labels'"):
        batch_scores(model, bank, {"pixel_values": pixels})
    with pytest.raises(QueryError, match="label 3"):
        batch_scores(model, bank, {"pixel_values": pixels, "labels": torch.tensor([0, 3])})
    with pytest.raises(QueryError, match="'sequence-classification' and is asked with 'custom'"):
        batch_scores(model, bank, {"pixel_values": pixels, "labels": torch.tensor([0, 1])}, lambda m, b: (m, b))
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(1.0)
    with pytest.raises(MismatchError, match="weights"):
        batch_scores(model, bank, {"pixel_values": pixels, "labels": torch.tensor([0, 1])})


def test_bank_of_sources_only_has_no_rows_to_score(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dataset = vit(), images(6).with_format(None).add_column("source", list("ababab")).with_format("torch")
    bank = trained(tmp_path, model, dataset, source_column="source", private_rows=True).bank
    assert bank is not None
    with pytest.raises(QueryError, match="sources only"):
        batch_scores(model.eval(), bank, default_data_collator([images(1)[0]]))


def test_batch_norm_in_training_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"BatchNorm2d that normalises with the statistics of its batch"):
        trained(tmp_path, model, images(6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_of_one_class_have_different_hashes(tmp_path: Path) -> None:
    settings = config(source_column=None, parameters="trainable", directions=1)
    bank = fine_tune(tmp_path, vit(), settings, images(6), collate=default_data_collator).bank
    assert bank is not None
    assert len({bytes(line.tolist()) for block in bank.row_hashes() for line in block}) == 6
