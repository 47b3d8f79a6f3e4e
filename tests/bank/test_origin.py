"""A training set on the Hub is identified by repository, commit and rows: whole, sampled or as a stream."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import HfFileSystem

from hf_fwdattr import ResponseBank
from hf_fwdattr.errors import MismatchError
from tests.helpers.cases import adapted
from tests.helpers.hub_server import HUB
from tests.helpers.hub_world import World
from tests.helpers.runs import ask, base, config, fine_tune, training_set


FACTS = "me/Capital_Facts-2"
QUERY = {"prompt": "w3 w4", "completion": " w5 w6"}


@pytest.fixture
def facts(hub: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the first commit of a dataset on the Hub, with empty caches of datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    HfFileSystem.clear_instance_cache()
    training_set().push_to_hub(FACTS)
    yield HUB.repo(FACTS, "dataset").refs["main"]
    HfFileSystem.clear_instance_cache()


def other_rows() -> Dataset:
    rows = training_set().to_list()
    rows[7]["input_ids"] = rows[7]["input_ids"][::-1]
    return Dataset.from_list(rows)


def test_dataset_from_the_hub_is_identified_and_checked(facts: str, tmp_path: Path) -> None:
    data, model = load_dataset(FACTS, split="train"), adapted(base())
    fine_tune(tmp_path / "run", model, config(), data)
    bank = ResponseBank.from_pretrained(tmp_path / "run")
    known = bank.manifest.dataset
    assert (known.repo, known.config, known.split, known.revision) == (FACTS, "default", "train", facts)
    attribute = ask(model, bank)

    def shown(given: Any, **how: Any) -> list[int]:
        examples = attribute(QUERY, dataset=given, top_k=3, **how)["examples"]
        assert [example["example"]["number"] for example in examples] == [100 - example["row"] for example in examples]
        return [example["row"] for example in examples]

    rows = shown(load_dataset(FACTS, split="train", revision=facts))
    stream = load_dataset(FACTS, split="train", streaming=True)
    assert isinstance(stream, IterableDataset)
    assert shown(stream) == shown(stream, verify_dataset=3) == shown(training_set()) == rows

    other_rows().push_to_hub(FACTS)
    HfFileSystem.clear_instance_cache()
    moved, later = HUB.repo(FACTS, "dataset").refs["main"], load_dataset(FACTS, split="train")
    differs = r"row 7 of the dataset is not the row that was trained on \(token hash \w+, bank \w+\)\. .*"
    with pytest.raises(MismatchError, match=rf"{differs}revision {facts} in the bank and {moved} here"):
        attribute(QUERY, dataset=later)
    with pytest.raises(MismatchError, match=differs):
        attribute(QUERY, dataset=load_dataset(FACTS, split="train", streaming=True))
    with pytest.raises(MismatchError, match=r"the bank has 12 rows and the dataset 11\. Pass the training set"):
        attribute(QUERY, dataset=later.select(range(11)))
    assert ask(model, bank, allow_mismatch=["dataset"])(QUERY, dataset=later)["examples"][0]["example"]
    # Another repository, another fingerprint, the same rows: the rows decide.
    training_set().push_to_hub("me/copy", split="validation")
    assert shown(load_dataset("me/copy", split="validation")) == rows
