from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_fwdattr.bank.identity import dataset_identity, model_identity, tokenizer_hash
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.trainer.row_weights import KEY, BatchRecorder, Indexed, Step, loader_of
from tests.helpers.cases import adapted, gpt2, padded, token_rows
from tests.helpers.runs import tokenizer, training_set


class Seeing(nn.Module):
    """A model that remembers what it was called with, and returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls: list[dict[str, Any]] = []

    def forward(self, **given: Any) -> dict[str, Tensor]:
        self.calls.append(given)
        return {"loss": 2.0 * self.weight} if "labels" in given else {}


def attached(shifted: bool = True) -> tuple[Seeing, DataLoader, BatchRecorder]:
    model = Seeing().train()
    loader: DataLoader = DataLoader(token_rows(10), batch_size=4, collate_fn=padded)  # type: ignore[arg-type]
    return model, loader, BatchRecorder(model, loader, shifted)


def finalize(exposure: BatchRecorder, ranks: int = 1, rule: float | None = None, **more: Any) -> tuple[list, list]:
    _, rows, weights, _ = Step(0.1, exposure.take(), **more).finalize(ranks, rule)
    return rows.tolist(), weights.tolist()


def test_rows_are_known_and_the_model_does_not_see_them() -> None:
    model, loader, exposure = attached()
    rows, weights = [], []
    for batch in loader:
        model(**batch, num_items_in_batch=torch.tensor(8))["loss"].backward()
        step = finalize(exposure)
        rows.append(step[0])
        weights.append(step[1])
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert weights == [[1 / 8] * 4, [1 / 8] * 4, [1 / 8] * 2]
    assert all(set(call) == {"input_ids", "labels", "attention_mask", "num_items_in_batch"} for call in model.calls)
    for call, plain in zip(model.calls, DataLoader(token_rows(10), batch_size=4, collate_fn=padded), strict=True):  # type: ignore[arg-type]
        assert all(torch.equal(call[key], plain[key]) for key in plain)


@pytest.mark.parametrize("shifted", [True, False])
def test_without_a_count_the_loss_is_a_mean_and_the_loop_says_what_it_made_of_it(shifted: bool) -> None:
    """Two micro-batches of one step: each is divided by its own labels, and by whatever the loop divides them by."""
    model, loader, exposure = attached(shifted)
    batches = iter(loader)
    expected = []
    for share in (0.5, 0.25):
        batch = next(batches)
        (model(**batch)["loss"] * share * 1024.0).backward()
        labels = batch["labels"][:, 1:] if shifted else batch["labels"]
        expected += [share / 3 / int((labels != -100).sum())] * 4
    rows, weights = finalize(exposure, ranks=3, unscale=1024.0)
    assert rows == list(range(8))
    assert weights == pytest.approx(expected)
    assert finalize(exposure)[0] == []


def test_a_loss_that_is_not_the_models_is_refused() -> None:
    model, loader, exposure = attached()
    batch = next(iter(loader))
    (model(**batch)["loss"].detach() * model.weight).backward()
    with pytest.raises(UnsupportedError, match="does not use the loss that the model returns"):
        finalize(exposure)
    del batch["labels"]
    model(**batch)
    with pytest.raises(UnsupportedError, match="does not use the loss that the model returns"):
        finalize(exposure, rule=1.0)


def test_a_rule_stands_in_for_a_loss_that_is_made_of_the_logits() -> None:
    model, loader, exposure = attached()
    batch = next(iter(loader))
    del batch["labels"]
    model(**batch, num_items_in_batch=7)
    assert finalize(exposure, ranks=2, rule=2.0)[1] == [pytest.approx(1 / 7)] * 4


def test_evaluation_in_between_is_not_training() -> None:
    model, loader, exposure = attached()
    model.eval()
    batch = next(iter(loader))
    batch[KEY] = torch.arange(4)
    model(**batch)
    model(input_ids=torch.zeros(1, 2))
    assert finalize(exposure)[0] == []
    assert KEY not in model.calls[0]


def test_afterwards_everything_is_as_before() -> None:
    model, loader, exposure = attached()
    exposure.detach()
    dataset: Any = loader.dataset
    assert dataset == token_rows(10)
    assert loader.collate_fn is padded
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert KEY not in next(iter(loader))


def test_a_marked_dataset_is_the_dataset() -> None:
    plain = training_set()
    marked = Indexed(plain)
    assert len(marked) == len(plain)
    assert marked.column_names == plain.column_names
    assert marked[3] == plain[3] | {KEY: 3}
    assert marked.__getitems__([5, 2]) == [marked[5], marked[2]]
    assert Indexed(token_rows(4)).__getitems__([3])[0][KEY] == 3
    with pytest.raises(UnsupportedError, match="row 1 of the dataset is a list"):
        Indexed([[1], [2]])[1]


def test_a_stream_has_no_rows() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(token_rows(2))

    with pytest.raises(UnsupportedError, match="is a stream"):
        loader_of(DataLoader(Stream()))


def test_what_things_are_called() -> None:
    model = gpt2()
    model.config._name_or_path, model.config._commit_hash = "me/base", "abc"
    assert model_identity(model) == model_identity(adapted(model)) == ("me/base", "abc")
    assert model_identity(nn.Linear(1, 1)) == (None, None)
    assert tokenizer_hash(None) is None
    assert tokenizer_hash(tokenizer()) == tokenizer_hash(tokenizer())
    more = tokenizer()
    more.add_tokens(["w99"])
    assert tokenizer_hash(more) != tokenizer_hash(tokenizer())
    identity = dataset_identity(training_set())
    assert identity["columns"] == training_set().column_names
    nothing = dict.fromkeys(("repo", "revision", "config", "split", "fingerprint"))
    assert dataset_identity([1]) == nothing | {"columns": []}
    data = training_set()
    data.info.download_checksums = {f"hf://datasets/me/facts@{'a' * 40}/data.json": {"num_bytes": 1}}
    assert dataset_identity(data) | {"repo": "me/facts", "revision": "a" * 40} == dataset_identity(data)
