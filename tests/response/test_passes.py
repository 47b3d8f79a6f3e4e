"""Banks of one recorded run under different numbers of directions, memory budgets and curvatures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_fwdattr.response.assembly
from hf_fwdattr import ResponseBank, ResponseCallback, build_bank
from hf_fwdattr.errors import NumericalError, UnsupportedError
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree
from tests.helpers.runs import ROWS, ask, base, config, queries, trainer_for, training_set


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("run")
    model, callback = adapted(base()), ResponseCallback(config())
    trainer_for(folder, model, training_set(), callback).train()
    callback.recorder.record.save(folder / "record")
    return model, folder / "record"


def built(run: tuple[nn.Module, Path], **changes: Any) -> ResponseBank:
    model, record = run
    return build_bank(model, training_set(), config(**changes), data_collator=padded, record=record)


def scores(run: tuple[nn.Module, Path], bank: ResponseBank) -> Tensor:
    return ask(run[0], bank).scores(queries())


def test_memory_maps_give_the_same_bank_and_are_removed(
    run: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    in_memory = scores(run, built(run))
    mapped = scores(run, built(run, memory_budget=0))
    assert torch.equal(in_memory, mapped)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("fwdattr-bank-")]


def test_more_directions_explain_more(run: tuple[nn.Module, Path]) -> None:
    exact = scores(run, built(run))
    errors, explained = [], []
    for k in (1, 3, 6, 12):
        bank = built(run, directions=k)
        assert bank.manifest.directions == k
        errors.append(float((scores(run, bank) - exact).norm() / exact.norm()))
        explained.append(bank.manifest.explained_variance)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert explained == sorted(explained)
    assert errors[0] > 0.1


def test_a_variance_chooses_the_fewest_directions_that_explain_it(run: tuple[nn.Module, Path]) -> None:
    bank = built(run, directions=0.7)
    k = bank.manifest.directions
    assert bank.manifest.explained_variance >= 0.7
    assert k == 1 or built(run, directions=k - 1).manifest.explained_variance < 0.7


def test_no_more_directions_than_rows_are_kept(run: tuple[nn.Module, Path]) -> None:
    assert built(run, directions=500).manifest.directions == ROWS


def test_directions_are_the_parameters_where_rows_are_more(tmp_path: Path) -> None:
    model, callback = adapted(base()), ResponseCallback(config(parameters=[r"h\.1\..*c_attn\.lora_B"]))
    trainer_for(tmp_path, model, training_set(80), callback).train()
    bank = callback.bank
    assert bank is not None
    assert (bank.manifest.size, bank.manifest.directions, bank.manifest.exact) == (72, 72, True)
    agree(bank.directions()[:72], torch.eye(72), 1e-12)


def test_exact_banks_of_too_many_directions_are_refused(
    run: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_fwdattr.response.assembly, "_MAX_EXACT", 11)
    with pytest.raises(UnsupportedError, match=r"12 rows and .* would hold 12 directions; at most 11 are kept"):
        built(run)


@pytest.mark.parametrize("samples", [0, 5, 12, 30])
def test_any_number_of_curvature_samples_is_allowed(run: tuple[nn.Module, Path], samples: int) -> None:
    bank = built(run, curvature_samples=samples)
    assert bank.manifest.curvature_samples == samples
    assert bool(torch.isfinite(scores(run, bank)).all())


def test_curvature_matters_and_depends_on_the_seed(run: tuple[nn.Module, Path]) -> None:
    default = scores(run, built(run))
    assert torch.equal(default, scores(run, built(run)))
    for changes in (dict(curvature_samples=0), dict(seed=1)):
        assert float((scores(run, built(run, **changes)) - default).norm() / default.norm()) > 1e-3


def test_infinite_losses_are_refused(run: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        labels = batch.pop("labels")
        return model(**batch, use_cache=False).logits[:, :-1] * float("inf"), labels[:, 1:]

    with pytest.raises(NumericalError, match="is not finite"):
        built(run, objective=infinite)


def test_custom_objectives_receive_every_column(run: tuple[nn.Module, Path]) -> None:

    def on_even_rows(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "number")}
        labels = batch["labels"][:, 1:]
        return model(**inputs, use_cache=False).logits[:, :-1], labels.masked_fill(
            batch["number"][:, None] % 2 == 1, -100
        )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
        return batch | {"number": torch.tensor([row["number"] for row in rows])}

    model, record = run
    settings = config(objective=on_even_rows, curvature_samples=0)
    custom = build_bank(model, training_set(), settings, data_collator=collate, record=record)
    actual, plain = scores(run, custom), scores(run, built(run, curvature_samples=0))
    even = torch.tensor([number % 2 == 0 for number in training_set()["number"]])
    assert bool((actual[:, ~even] == 0).all())
    agree(actual[:, even], plain[:, even], 1e-6)
    assert custom.manifest.objective == "custom"
