from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_fwdattr.bank.identity import dataset_identity, model_identity, tokenizer_hash
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.trainer.patching import Patches
from hf_fwdattr.trainer.row_weights import BatchRecorder, IndexedDataset, OptimizerStep, base_loader
from hf_fwdattr.trainer.streams import ROW_KEY
from tests.helpers.cases import adapted, gpt2, padded, token_rows
from tests.helpers.runs import config, fine_tune, tokenizer, training_set


class CallRecorder(nn.Module):
    """A model that keeps the arguments of its calls, and returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls: list[dict[str, Any]] = []

    def forward(self, **given: Any) -> dict[str, Tensor]:
        self.calls.append(given)
        return {"loss": 2.0 * self.weight} if "labels" in given else {}


def attached(shifted: bool = True) -> tuple[CallRecorder, DataLoader, BatchRecorder, Patches]:
    model = CallRecorder().train()
    loader: DataLoader = DataLoader(token_rows(10), batch_size=4, collate_fn=padded)  # type: ignore[arg-type]
    patches = Patches()
    return model, loader, BatchRecorder(model, loader, patches, shifted), patches


def finalize(
    recorder: BatchRecorder, processes: int = 1, loss_gradient: float | None = None, **more: Any
) -> tuple[list, list]:
    _, rows, weights, _ = OptimizerStep(0.1, recorder.take(), **more).finalize(processes, loss_gradient)
    return rows.tolist(), weights.tolist()


def test_row_indices_are_recorded_and_hidden_from_the_model() -> None:
    model, loader, recorder, _ = attached()
    rows, weights = [], []
    for batch in loader:
        model(**batch, num_items_in_batch=torch.tensor(8))["loss"].backward()
        step = finalize(recorder)
        rows.append(step[0])
        weights.append(step[1])
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert weights == [[1 / 8] * 4, [1 / 8] * 4, [1 / 8] * 2]
    assert all(set(call) == {"input_ids", "labels", "attention_mask", "num_items_in_batch"} for call in model.calls)
    for call, plain in zip(model.calls, DataLoader(token_rows(10), batch_size=4, collate_fn=padded), strict=True):  # type: ignore[arg-type]
        assert all(torch.equal(call[key], plain[key]) for key in plain)


@pytest.mark.parametrize("shifted", [True, False])
def test_mean_losses_are_weighted_by_their_gradient(shifted: bool) -> None:
    """Two micro-batches of one step: each is divided by its own labels, and by whatever the loop divides them by."""
    model, loader, recorder, _ = attached(shifted)
    batches = iter(loader)
    expected = []
    for share in (0.5, 0.25):
        batch = next(batches)
        (model(**batch)["loss"] * share * 1024.0).backward()
        labels = batch["labels"][:, 1:] if shifted else batch["labels"]
        expected += [share / 3 / int((labels != -100).sum())] * 4
    rows, weights = finalize(recorder, processes=3, loss_scale=1024.0)
    assert rows == list(range(8))
    assert weights == pytest.approx(expected)
    assert finalize(recorder)[0] == []


def test_loss_other_than_the_models_is_refused() -> None:
    model, loader, recorder, _ = attached()
    batch = next(iter(loader))
    (model(**batch)["loss"].detach() * model.weight).backward()
    with pytest.raises(UnsupportedError, match="does not use the loss that the model returns"):
        finalize(recorder)
    del batch["labels"]
    model(**batch)
    with pytest.raises(UnsupportedError, match="does not use the loss that the model returns"):
        finalize(recorder, loss_gradient=1.0)


def test_given_loss_gradient_stands_in_for_a_loss_computed_from_logits() -> None:
    model, loader, recorder, _ = attached()
    batch = next(iter(loader))
    del batch["labels"]
    model(**batch, num_items_in_batch=7)
    assert finalize(recorder, processes=2, loss_gradient=2.0)[1] == [pytest.approx(1 / 7)] * 4


def test_evaluation_is_not_recorded() -> None:
    model, loader, recorder, _ = attached()
    model.eval()
    batch = next(iter(loader))
    batch[ROW_KEY] = torch.arange(4)
    model(**batch)
    model(input_ids=torch.zeros(1, 2))
    assert finalize(recorder)[0] == []
    assert ROW_KEY not in model.calls[0]


def test_undo_restores_model_and_loader() -> None:
    model, loader, _, patches = attached()
    patches.undo()
    dataset: Any = loader.dataset
    assert dataset == token_rows(10)
    assert loader.collate_fn is padded
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert ROW_KEY not in next(iter(loader))


def test_indexed_dataset_is_the_dataset_with_an_index() -> None:
    plain = training_set()
    indexed = IndexedDataset(plain)
    assert len(indexed) == len(plain)
    assert indexed.column_names == plain.column_names
    assert indexed[3] == plain[3] | {ROW_KEY: 3}
    assert indexed.__getitems__([5, 2]) == [indexed[5], indexed[2]]
    assert IndexedDataset(token_rows(4)).__getitems__([3])[0][ROW_KEY] == 3
    assert IndexedDataset([[1], [2]])[1] == ([2], 1)


def test_rows_may_be_anything_that_the_collator_takes(tmp_path: Path) -> None:
    rows: Any = [(row["input_ids"], row["labels"]) for row in token_rows(12)]

    def collate(pairs: list[Any]) -> dict[str, Tensor]:
        return padded([{"input_ids": tokens, "labels": labels} for tokens, labels in pairs])

    callback = fine_tune(tmp_path, adapted(gpt2(torch.float32)), config(source_column=None), rows, collate=collate)
    assert sorted(torch.cat(callback.recorder.record.rows).tolist()) == sorted([*range(12)] * 3)
    assert callback.bank is not None


def test_stream_without_row_ids_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(token_rows(2))

    with pytest.raises(UnsupportedError, match="is a stream"):
        base_loader(DataLoader(Stream()))


def test_identities_of_model_tokenizer_and_dataset() -> None:
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
