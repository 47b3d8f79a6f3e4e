"""The measurements' own drawings and arithmetic, on made-up outcomes."""

from pathlib import Path
from types import SimpleNamespace

import lora_loo
import pictures
import pytest
import torch
from torch import Tensor

from hf_fwdattr.evaluation.agreement import agreement


def test_pictures_are_drawn_from_the_result_files(tmp_path: Path) -> None:
    pictures.probes_against_lds(pictures.kept("lds_lora"), tmp_path / "k.png")
    pictures.cost_and_lds(pictures.kept("peers"), tmp_path / "peers.png")
    pictures.passes_against_top(pictures.kept("smollm2_curve"), tmp_path / "passes.png")
    pictures.networks_against_lds(pictures.kept("mnist_mlp"), pictures.kept("mnist_peers"), tmp_path / "mnist.png")
    pictures.methods_and_lds(pictures.kept("text_classification"), tmp_path / "methods.png")
    for name in ("k.png", "peers.png", "passes.png", "mnist.png", "methods.png"):
        data = (tmp_path / name).read_bytes()
        assert data[:4] == b"\x89PNG"
        assert len(data) < 100_000


def test_calibration_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_loo, "FOLDER_OF_RESULTS", tmp_path)
    found = agreement(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 2, 2]]))
    lora_loo.picture({"a row": found, "a source": found})
    assert (tmp_path / "lora_loo.png").read_bytes()[:4] == b"\x89PNG"


def test_removals_of_a_linear_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses rise by the scores of what is gone: the right scores cost more than random rows, and lose the gain."""
    rows, queries = 100, 3
    truth = torch.rand(5, rows, generator=torch.Generator().manual_seed(0)).double()

    def outcomes(weights: Tensor, workers: int, title: str) -> Tensor:
        return (1 - weights.double()) @ truth.T + 2.0

    world = SimpleNamespace(rows=range(rows), queries=None, model=lambda: torch.nn.Linear(1, 1))
    monkeypatch.setattr(lora_loo, "outcomes", outcomes)
    monkeypatch.setattr(lora_loo.lora_world, "query_losses", lambda *_: torch.full((5,), 12.0))  # a gain of ten nats
    lines = lora_loo.removals(world, {"right": truth, "wrong": -truth}, queries, 1)
    by_method = {name: [line for line in lines if line["method"] == name] for name in ("right", "wrong")}
    assert [line["rows left out"] for line in by_method["right"]] == [1, 5, 10, 20]
    for right, wrong in zip(*by_method.values(), strict=True):
        count = right["rows left out"]
        expected = truth[:queries].topk(count, dim=1).values.sum(1)
        assert right["rise"] == pytest.approx(float(expected.mean()))
        assert right["half of the gain lost"] == pytest.approx(float((expected >= 5).double().mean()))
        assert wrong["rise"] < right["random rows"] == wrong["random rows"] < right["rise"]


def test_a_derivative_is_divided_by_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a world whose loss falls with the square of a row's weight: gone 1, derivative 2, at any step."""

    def retrain(train, weights: Tensor, *_, **__) -> Tensor:  # type: ignore[no-untyped-def]
        return (-weights.square() @ torch.eye(6, dtype=torch.float64))[None]

    monkeypatch.setattr(lora_loo, "retrain", retrain)
    gone, exact = lora_loo.derivatives(torch.tensor([4, 1]), 6, 0.1, 1)
    expected = torch.zeros(6, 2, dtype=torch.float64)
    expected[4, 0] = expected[1, 1] = 1.0
    assert torch.allclose(gone, expected)
    assert torch.allclose(exact, 2 * expected)
