from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_fwdattr.bank.hashing import row_hash, row_hashes
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.response.dataset import TrainingRows, uniforms
from tests.helpers.cases import padded, token_rows


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 7))
def test_batches_cover_every_row_once_with_its_index(count: int, batch_size: int) -> None:
    data = token_rows(count)
    seen = []
    for indices, batch in TrainingRows(data, padded, batch_size).batches():
        assert len(indices) == len(batch["input_ids"]) <= batch_size
        for index, line, mask in zip(indices.tolist(), batch["input_ids"], batch["attention_mask"], strict=True):
            assert line[mask.bool()].tolist() == data[index]["input_ids"]
            seen.append(index)
    assert sorted(seen) == list(range(count))


def test_batches_group_rows_of_similar_length() -> None:
    """Rows are sorted by length within a window, so most padding is never computed."""
    data = token_rows(64)
    tokens = sum(len(row["input_ids"]) for row in data)
    sorted_size = sum(batch["input_ids"].numel() for _, batch in TrainingRows(data, padded, 4).batches())
    plain_size = sum(padded(data[at : at + 4])["input_ids"].numel() for at in range(0, 64, 4))
    assert tokens <= sorted_size < tokens + 0.3 * (plain_size - tokens)


def test_batches_read_only_the_given_rows() -> None:
    rows = TrainingRows(token_rows(9), padded, 2)
    assert sorted(i for indices, _ in rows.batches([7, 3, 5]) for i in indices.tolist()) == [3, 5, 7]


def test_collators_cannot_change_the_dataset() -> None:
    def greedy(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded([dict(feature) for feature in features])
        for feature in features:
            feature.clear()
        return batch

    data = token_rows(3)
    list(TrainingRows(data, greedy, 2).batches())
    assert data == token_rows(3)


def test_packed_rows_are_refused() -> None:
    def packed(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: value.reshape(1, -1) for key, value in padded(features).items()}

    with pytest.raises(UnsupportedError, match="makes 1 out of 2 rows"):
        TrainingRows(token_rows(4), packed, 2)


def test_row_hashes_ignore_padding() -> None:
    data = token_rows(5)
    salt = b"0123456789abcdef"
    expected = [row_hash(row["input_ids"], salt) for row in data]
    batch = padded(data)
    wide = [{key: batch[key][i].tolist() for key in ("input_ids", "attention_mask")} for i in range(5)]
    left = [{key: value[::-1] for key, value in row.items()} for row in wide]
    reversed_rows = [row_hash(row["input_ids"][::-1], salt) for row in data]
    for form, hashes in (
        (data, expected), (wide, expected), (left, reversed_rows),
        (Dataset.from_list(data), expected), (Dataset.from_list(wide), expected),
        (Dataset.from_list(data).with_format("torch"), expected),
        (Dataset.from_list(wide).with_format("numpy"), expected),
    ):  # fmt: skip
        actual = row_hashes(form, salt)
        assert actual is not None
        assert list(actual) == hashes
    assert row_hash(data[0]["input_ids"], b"another salt") != expected[0]
    assert len({*expected, row_hash([*data[0]["input_ids"], 0], salt)}) == 6


def test_rows_without_tokens_have_no_row_hash() -> None:
    assert row_hashes([{"text": "a"}], b"") is None
    assert row_hashes(Dataset.from_list([{"text": "a"}]), b"") is None
    assert row_hashes([torch.zeros(3)], b"") is None


def test_uniforms_depend_on_row_and_key_alone() -> None:
    whole = uniforms(torch.tensor([4, 7, 9]), 5, 0, 1)
    assert torch.equal(uniforms(torch.tensor([9, 4]), 3, 0, 1), whole[[2, 0], :3])
    assert not torch.equal(uniforms(torch.tensor([4]), 5, 0, 2), whole[:1])
    many = uniforms(torch.arange(2000), 4, 3)
    assert many.dtype == torch.float64
    assert 0 <= float(many.min()) < float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=0.02)
    assert abs(float(torch.corrcoef(many.T)[0, 1])) < 0.1
