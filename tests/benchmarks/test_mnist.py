"""The machinery of the MNIST benchmark, on random blobs: networks trained together, scores by inner products."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.__main__ import main
from benchmarks.methods import inner_products, mnist_networks
from benchmarks.protocols import mnist as protocol
from benchmarks.report import results
from benchmarks.worlds import mnist
from torch import Tensor, nn

from hf_fwdattr.evaluation.agreement import Agreement, agreement
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.response.curvature import Curvature
from hf_fwdattr.response.segment import Segment
from tests.helpers.reference import agree


WORLD = mnist.blobs()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def train_alone(world: mnist.Digits, rows: Tensor, seed: int, weights: Tensor | None = None) -> nn.Sequential:
    """Train one network in plain PyTorch: the definition."""
    draws = mnist.Draws(seed, world.widths)
    model = mnist.module(world, torch.cat([value.flatten() for value in draws.weights()])).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=mnist.RATE, momentum=mnist.MOMENTUM)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for _ in range(world.epochs):
        order, masks = draws.epoch(len(rows))
        for start in range(0, len(rows), world.batch):
            index = rows[order[start : start + world.batch]]
            x = world.images[index]
            for linear, mask in zip(
                linears, masks[start : start + world.batch].split(world.widths[1:-1], 1), strict=False
            ):
                x = torch.relu(linear(x)) * mask
            losses = nn.functional.cross_entropy(linears[-1](x), world.labels[index], reduction="none")
            optimizer.zero_grad()
            (losses if weights is None else losses * weights[index]).mean().backward()
            optimizer.step()
    return model.eval()


def query_losses(model: nn.Module) -> Tensor:
    logits = model(WORLD.query_images)
    return nn.functional.cross_entropy(logits, WORLD.query_labels, reduction="none").detach().double()


def test_networks_trained_together_are_those_trained_alone() -> None:
    rows = [torch.randperm(60, generator=torch.Generator().manual_seed(i))[:30] for i in range(3)]
    together, _ = mnist.train_many(WORLD, rows, [5, 6, 7])
    for number, (own, seed) in enumerate(zip(rows, (5, 6, 7), strict=True)):
        agree(mnist.flat(together, number), flat(train_alone(WORLD, own, seed)), 1e-5)


def test_weighted_networks_trained_together_are_those_trained_alone() -> None:
    weights = torch.ones(3, 60)
    weights[1, 4] = weights[2, 9] = 0.0
    together, _ = mnist.train_many(WORLD, [WORLD.everyone] * 3, [5] * 3, weights)
    for number in range(3):
        alone = train_alone(WORLD, WORLD.everyone, 5, weights[number])
        agree(mnist.flat(together, number), flat(alone), 1e-5)
    losses = mnist.losses_many(WORLD, together)
    agree(losses[2], query_losses(alone), 1e-4)
    assert not torch.allclose(losses[0], losses[1])


def test_halves_get_fresh_seeds(tmp_path: Path) -> None:
    halves = torch.rand(3, 60, generator=torch.Generator().manual_seed(0)).argsort(1) < 30
    assert mnist.fresh_seed(halves[0], 0) != mnist.fresh_seed(halves[1], 0) != mnist.fresh_seed(halves[1], 1)
    settings = dict(folder=tmp_path, quiet=True, name=WORLD.version)
    found = retrain(mnist.outcomes(WORLD), halves, [0, 1], group_size=4, **settings)
    alone = train_alone(WORLD, halves[2].nonzero().flatten(), mnist.fresh_seed(halves[2], 1))
    agree(found[1, 2], query_losses(alone), 1e-4)
    assert mnist.blobs(seed=1).version != WORLD.version != replace(WORLD, epochs=2).version


@pytest.fixture(scope="module")
def network() -> mnist_networks.Network:
    parameters, copies = mnist.train_many(
        WORLD, [WORLD.everyone], [3], moments=inner_products.middles(WORLD, mnist_networks.SEGMENTS)
    )
    return mnist_networks.Network(WORLD, 3, mnist.flat(parameters, 0), copies[0])


def test_gradients_are_those_of_autograd(network: mnist_networks.Network) -> None:
    model = mnist.module(WORLD, network.theta)
    found = network.queries().dense()
    for row in range(3):
        loss = torch.nn.functional.cross_entropy(model(WORLD.query_images[row][None]), WORLD.query_labels[row][None])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        agree(found[row], expected, 1e-5)
    agree(network.queries() @ network.queries(), found @ found.T, 1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("proportional", [True, False])
def test_scores_are_those_of_the_library(network: mnist_networks.Network, count: int, proportional: bool) -> None:
    run, spectra = network.run(count, proportional=proportional)
    response, ends = None, []
    for info, spectrum in zip(run, spectra, strict=True):
        curvature = Curvature(spectrum.factor.dense(), 0.0, sampled=True)
        segment = Segment(info.theta, torch.ones_like(info.theta), info.horizon, info.row_weights, 0.0, curvature)
        pushes = network.rows(info.theta).dense() * info.row_weights[:, None].float()
        response = segment.propagate(response, pushes)
        ends.append(response)
    assert response is not None
    expected = -(network.queries().dense() @ response.T).double()
    agree(network.end(count, proportional=proportional), expected, 1e-3)
    asked = network.queries(torch.stack([info.theta for info in run]).mean(0)).dense()
    mean = -(asked @ torch.stack(ends).mean(0).T).double()
    agree(network.averaged(count, proportional=proportional), mean, 1e-3)


def test_row_weights_are_those_of_the_run() -> None:
    for info in inner_products.segments(WORLD, 3, 1, [mnist.Moment(8, torch.zeros(1))]):
        assert float(info.row_weights.sum()) == pytest.approx(1.0)
        assert len(info.row_weights.unique()) > 1  # the last batch of an epoch is smaller: its rows weigh more
        assert info.horizon.length == pytest.approx(16 * 0.01 / 0.1)


def test_proportional_samples_keep_the_exact_trace(network: mnist_networks.Network) -> None:
    """The trace of the exact Gauss-Newton matrix over all labels, and equal lengths."""
    spectrum = inner_products.Spectrum(WORLD, network.theta, 50)
    chances, _ = inner_products.probabilities(mnist.unflat(WORLD, network.theta), WORLD.images)
    total = 0.0
    for label in range(4):
        drawn = inner_products.gradients(WORLD, network.theta, WORLD.images, torch.full((60,), label)).dense()
        total += float((drawn.square().sum(1) * chances[:, label]).sum()) / 60
    lengths = spectrum.factor.dense().square().sum(1)
    assert float(lengths.sum()) == pytest.approx(total, rel=1e-4)
    assert float(lengths.std() / lengths.mean()) < 1e-3


def test_peers_are_judged_and_failures_shown(tmp_path: Path) -> None:
    class Truth:
        def lds(self, scores: Tensor) -> float:
            return float(scores.mean())

        def left_out(self, scores: Tensor) -> Agreement:
            return agreement(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 2, 3]]))

    for name, count, more in (
        ("TRAK, 10 networks", 10, {"scores": torch.ones(8, 60)}),
        ("TRAK, 5 networks", 5, {"scores": torch.zeros(8, 60), "error": ""}),
        ("CG, 1 network", 1, {"error": "TimeoutError: late\nand more"}),
    ):
        kept = {"networks": torch.tensor(count), "seconds": torch.tensor(2.0)} | more
        torch.save(kept, tmp_path / f"dattri {name}.pt")
    lines = protocol.peer_lines(tmp_path, Truth())
    assert [line["method"] for line in lines] == [
        "dattri CG, 1 network", "dattri TRAK, 5 networks", "dattri TRAK, 10 networks"
    ]  # fmt: skip
    assert [line["LDS"] for line in lines] == ["-", 0.0, 1.0]
    assert [line["error"] for line in lines] == ["TimeoutError: late", "-", "-"]


def test_networks_written_for_peers(tmp_path: Path, network: mnist_networks.Network) -> None:
    """The attributed networks come first; the others are trained as they would be alone."""
    protocol.write_networks(tmp_path, WORLD, [network], 3)
    ends = torch.load(tmp_path / "given.pt", weights_only=True)["ends"]
    assert torch.equal(ends[0], network.theta)
    agree(ends[2], flat(train_alone(WORLD, WORLD.everyone, mnist_networks.FIRST_SEED + 2)), 1e-5)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[dict[str, Any]]]:
    """Run a measurement on blobs; return the rows of one of its results."""
    monkeypatch.setenv("HF_FWDATTR_CACHE", str(tmp_path))
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def run(words: str, result: str) -> list[dict[str, Any]]:
        assert main([*words.split(), "--world", "mnist-blobs", "--results", str(tmp_path)]) == 0
        rows: list[dict[str, Any]] = json.loads((tmp_path / f"{result}.json").read_text())["rows"]
        return rows

    return run


def test_benchmark_in_small(measured: Callable[[str, str], list[dict[str, Any]]]) -> None:
    rows = measured("mnist", "lds_mnist_blobs")
    assert [row["method"] for row in rows] == [*mnist_networks.SEVERAL, *mnist_networks.ONE]
    left_out = {row["method"]: row["LOO Spearman"] for row in rows}
    assert left_out["three segments"] > 0.5  # rows really left out in this very run
    assert measured("mnist_literal --rows 3", "literal_mnist_blobs")
    assert len(measured("mnist_sensitivity --epochs 1", "sensitivity_1_epochs_mnist_blobs")) == 5
    assert measured("mnist", "cost_mnist_blobs")
    settings = {row["setting"] for row in measured("mnist_ablation", "ablation_mnist_blobs")}
    assert {"segments, trajectory average", "directions k", "snapshots averaged"} <= settings


def test_budget_curve_in_small(
    measured: Callable[[str, str], list[dict[str, Any]]], network: mnist_networks.Network
) -> None:
    exact, _ = protocol.exact_scores(network, 8)
    agree(exact, network.averaged(5), 1e-6)
    rows = measured("mnist_budget_curve --queries 8", "budget_curve_mnist_blobs")
    assert [row["method"] for row in rows][:2] == ["exact", "directions alone"]
    staged = [row["of the top ten"] for row in rows if row["method"] == "two stages"]
    assert len(staged) == len(protocol.BUDGETS)
    assert staged[-1] == pytest.approx(1.0)  # more passes than there are rows
    assert rows[1]["of the top ten"] <= staged[0]
