"""Rows that padding changes are refused with a cure that was tried on them, and that helps."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import FNetConfig, FNetForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.trainer.recorder import ResponseRecorder
from tests.helpers.cases import VOCABULARY, adapted, gpt2, padded, token_rows
from tests.helpers.runs import config


Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padded([{key: values[::-1] for key, values in row.items()} for row in rows])
    return {key: value.flip(1) for key, value in batch.items()}


def with_classes(collate: Collate) -> Collate:
    """Batches whose labels are classes: one more than the first token is odd."""
    return lambda rows: collate(rows) | {"labels": torch.tensor([row["input_ids"][0] % 2 for row in rows])}


def to_one_length(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return padded(rows, 16)


def xlnet() -> Any:
    """A classifier that reads a row's last token, so that padding belongs on the left."""
    torch.manual_seed(0)
    sizes: Any = dict(vocab_size=VOCABULARY, d_model=12, n_layer=2, n_head=2, d_inner=20, dropout=0.0, num_labels=2)
    model = XLNetForSequenceClassification(XLNetConfig(**sizes, summary_last_dropout=0.0))
    return get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["layer_1", "layer_2"]))


def fnet() -> Any:
    """A classifier that mixes all tokens of a row and knows no mask: padding moves it on either side."""
    torch.manual_seed(0)
    sizes: Any = dict(vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, intermediate_size=20, num_labels=2)
    model = FNetForSequenceClassification(FNetConfig(**sizes, max_position_embeddings=16, hidden_dropout_prob=0.0))
    return get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["dense"]))


def record(model: Any, collate: Collate) -> None:
    rows: Any = token_rows(8)
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = config(source_column=None, gradient_predictor=False)
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    ResponseRecorder(settings, accelerator=None, model=model, optimizer=optimizer, dataloader=loader, steps=2).detach()


@pytest.mark.parametrize(
    ("make", "collate", "cure", "cured"),
    [
        (xlnet, with_classes(padded), "Pad on the left: tokenizer.padding_side='left'", with_classes(left)),
        (lambda: adapted(gpt2(torch.float32)), left, "Pad on the right: tokenizer.padding_side='right'", padded),
        (fnet, with_classes(padded), "Pad all rows to one length, or train and", with_classes(to_one_length)),
    ],
    ids=["XLNet", "GPT-2", "FNet"],
)
def test_cure_was_tried_and_helps(make: Any, collate: Collate, cure: str, cured: Collate) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(cure)):
        record(make(), collate)
    record(make(), cured)


def test_batches_without_a_mask_are_told_to_have_one() -> None:
    def unmasked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = left(rows)
        del batch["attention_mask"]
        return batch

    with pytest.raises(UnsupportedError, match="returns an attention_mask"):
        record(adapted(gpt2(torch.float32)), unmasked)
