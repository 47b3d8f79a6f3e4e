"""Datasets as their owners have them: compared as the training tokenized them, or refused by what they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from hf_fwdattr.bank.hashing import row_hash
from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.errors import MismatchError, QueryError
from hf_fwdattr.query.training_set import TrainingSet
from tests.bank.test_bank import ROWS, described, parts
from tests.helpers.runs import tokenizer


SALT = bytes(16)
TEXTS = [" ".join(f"w{1 + (i * 7 + j) % 20}" for j in range(2 + i)) for i in range(ROWS)]
CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "w3"}] for text in TEXTS]
RAW: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "text": ([{"text": text, "n": 1} for text in TEXTS], TEXTS),
    "text with the end token": ([{"text": text} for text in TEXTS], [f"{text}<end>" for text in TEXTS]),
    "pairs": ([{"prompt": text, "completion": " w3"} for text in TEXTS], [f"{text} w3<end>" for text in TEXTS]),
    "chats": ([{"messages": chat} for chat in CHATS], [f"{text} w3" for text in TEXTS]),
    "chat pairs": ([{"prompt": c[:1], "completion": c[1:]} for c in CHATS], [f"{text} w3" for text in TEXTS]),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": "w3"}]} for t in TEXTS],
        [f"{text} w3" for text in TEXTS],
    ),
}


def training_set(folder: Path, texts: list[str], cut: slice = slice(None), longest: int = 0) -> TrainingSet:
    """A bank of these texts, cut as the training cut them."""
    ids = [tokenizer()(text)["input_ids"][cut] for text in texts]
    hashes = torch.stack([torch.frombuffer(bytearray(row_hash(row, SALT)), dtype=torch.uint8) for row in ids])
    fields = described(dataset={"rows": ROWS, "longest": longest})
    return TrainingSet(write_bank(folder, BankContents(fields, **(parts() | {"row_hashes": hashes}))), tokenizer())


@pytest.mark.parametrize("cut", [None, slice(5), slice(-5, None)])
@pytest.mark.parametrize("kind", RAW)
def test_raw_rows_are_verified_as_they_were_tokenized(tmp_path: Path, kind: str, cut: slice | None) -> None:
    rows, texts = RAW[kind]
    known = training_set(tmp_path, texts, cut or slice(None), 5 if cut else 0)
    for data in (rows, Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        assert known.verify(data) is None
        assert known.verify(data, 3) is None
    assert known.examples(rows, [4]) == {4: rows[4]}
    changed = [*rows[:5], rows[6], *rows[6:]]
    with pytest.raises(MismatchError, match="row 6 of the dataset is not the row that was trained on"):
        known.verify(changed)
    stream = IterableDataset.from_generator(lambda: iter(changed))
    with pytest.raises(MismatchError, match="row 5 of the dataset is not the row that was trained on"):
        known.verify(stream)


@pytest.mark.parametrize("kind", RAW)
def test_rows_that_the_training_shuffled_or_left_out_are_found(tmp_path: Path, kind: str) -> None:
    rows, texts = RAW[kind]
    known = training_set(tmp_path, texts)
    turned = rows[::-1]
    more = [*turned[:4], {"text": "w9"}, *turned[4:]]
    for data, order in ((turned, list(range(ROWS))[::-1]), (more, [*range(ROWS, 4, -1), *range(3, -1, -1)])):
        assert known.verify(data) == order
        assert known.examples(data, [0, 7], order) == {0: rows[0], 7: rows[7]}
    known.check(more, by_position=False)
    with pytest.raises(MismatchError, match="the bank has 10 rows and the dataset 11"):
        known.check(more)
    with pytest.raises(MismatchError, match="is not the row that was trained on"):
        known.verify(turned, 3)  # a sample is compared by position
    with pytest.raises(MismatchError, match="the bank has 10 rows and the dataset 9"):
        known.check(rows[:-1], by_position=False)
    with pytest.raises(QueryError, match=r"no usual way of tokenizing .*verify_dataset=False"):
        known.verify([{"text": "w9"} for _ in rows])


KINDS: list[tuple[Any, str]] = [
    (DatasetDict({"train": Dataset.from_list([{"text": "w1"}])}), r"splits 'train'.* Pass dataset\['train'\]"),
    ({"text": TEXTS}, "a dict, not a list of rows"),
    (iter([{"text": "w1"}]), "can be read only once"),
    ("me/data", "'me/data', a text"),
    ({1, 2}, "a set, which gives no rows by their position"),
    (7, "a int, which gives no rows by their position"),
]


@pytest.mark.parametrize(("data", "message"), KINDS)
def test_what_is_no_list_of_rows_is_refused_by_its_kind(tmp_path: Path, data: Any, message: str) -> None:
    known = training_set(tmp_path, TEXTS)
    for check in (known.check, known.verify):
        with pytest.raises(QueryError, match=message):
            check(data)


def test_tables_and_shorter_datasets_have_their_own_sentences(tmp_path: Path) -> None:
    known, rows = training_set(tmp_path, TEXTS), RAW["text"][0]
    frame = Dataset.from_list(rows).to_pandas()
    with pytest.raises(QueryError, match=r"Dataset\.from_pandas"):
        known.check(frame)
    known.verify(Dataset.from_pandas(frame))
    with pytest.raises(MismatchError, match="the bank has 10 rows and the dataset 9"):
        known.check(rows[:-1])
    with pytest.raises(MismatchError, match="row 9: the dataset ends before it"):
        known.examples(IterableDataset.from_generator(lambda: iter(rows[:-1])), [9])
    with pytest.raises(QueryError, match="verify_dataset=0: not a number of rows"):
        known.verify(rows, 0)
