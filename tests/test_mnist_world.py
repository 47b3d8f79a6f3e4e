"""The benchmark's own machinery, on random blobs: networks trained together, scores without parameter vectors."""

from pathlib import Path

import mnist_curve
import mnist_mlp
import mnist_scores
import mnist_world
import pytest
import results
import torch
from torch import Tensor

from hf_fwdattr.evaluation.agreement import Agreement, agreement
from hf_fwdattr.evaluation.retrain import retrain
from hf_fwdattr.response.curvature import Curvature
from hf_fwdattr.response.segment import Segment
from tests.helpers.reference import agree


WORLD = mnist_world.tiny()
EVERYONE = torch.arange(60)


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_together_as_alone_on_subsets() -> None:
    rows = [torch.randperm(60, generator=torch.Generator().manual_seed(i))[:30] for i in range(3)]
    group_size, _ = mnist_world.train_many(WORLD, rows, [5, 6, 7])
    for number, (own, seed) in enumerate(zip(rows, (5, 6, 7), strict=True)):
        agree(mnist_world.flat(group_size, number), flat(mnist_world.train_alone(WORLD, own, seed)), 1e-5)


def test_together_as_alone_with_weights_in_one_order() -> None:
    weights = torch.ones(3, 60)
    weights[1, 4] = weights[2, 9] = 0.0
    group_size, _ = mnist_world.train_many(WORLD, [EVERYONE] * 3, [5] * 3, weights)
    for number in range(3):
        alone = mnist_world.train_alone(WORLD, EVERYONE, 5, weights[number])
        agree(mnist_world.flat(group_size, number), flat(alone), 1e-5)
    losses = mnist_world.losses_many(WORLD, group_size)
    plain = torch.nn.functional.cross_entropy(alone(WORLD.query_images), WORLD.query_labels, reduction="none")
    agree(losses[2], plain.detach().double(), 1e-4)
    assert not torch.allclose(losses[0], losses[1])


def test_halves_get_fresh_seeds_and_are_kept(tmp_path: Path) -> None:
    halves = torch.rand(3, 60, generator=torch.Generator().manual_seed(0)).argsort(1) < 30
    assert mnist_world.fresh(halves[0], 0) != mnist_world.fresh(halves[1], 0) != mnist_world.fresh(halves[1], 1)
    settings = dict(folder=tmp_path, quiet=True, name=WORLD.version)
    found = retrain(mnist_world.halves_outcomes(WORLD), halves, [0, 1], group_size=4, **settings)
    alone = mnist_world.train_alone(WORLD, halves[2].nonzero().flatten(), mnist_world.fresh(halves[2], 1))
    plain = torch.nn.functional.cross_entropy(alone(WORLD.query_images), WORLD.query_labels, reduction="none")
    agree(found[1, 2], plain.detach().double(), 1e-4)
    assert mnist_world.tiny(seed=1).version != WORLD.version != mnist_world.shortened(WORLD, epochs=2).version


@pytest.fixture(scope="module")
def network() -> mnist_mlp.Network:
    parameters, copies = mnist_world.train_many(
        WORLD, [EVERYONE], [3], moments=mnist_scores.middles(WORLD, mnist_mlp.SEGMENTS)
    )
    return mnist_mlp.Network(WORLD, 3, mnist_world.flat(parameters, 0), copies[0], samples=40)


def test_gradients_are_autograds(network: mnist_mlp.Network) -> None:
    model = mnist_world.network(WORLD, mnist_world.unflat(WORLD, network.theta)).eval()
    found = network.end.dense()
    for row in range(3):
        loss = torch.nn.functional.cross_entropy(model(WORLD.query_images[row][None]), WORLD.query_labels[row][None])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        agree(found[row], expected, 1e-5)
    agree(network.end @ network.end, found @ found.T, 1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("proportional", [True, False])
def test_scores_are_those_of_the_librarys_segments(network: mnist_mlp.Network, count: int, proportional: bool) -> None:
    run = mnist_scores.stretches(WORLD, 3, count, network.moments)
    spectra = [network.spectrum(stretch.theta, proportional=proportional) for stretch in run]
    response, ends = None, []
    for stretch, spectrum in zip(run, spectra, strict=True):
        curvature = Curvature(spectrum.factor.dense(), 0.0, sampled=True)
        segment = Segment(
            stretch.theta, torch.ones_like(stretch.theta), stretch.horizon, stretch.share, 0.0, curvature
        )
        pushes = network.rows(stretch.theta).dense() * stretch.share[:, None].float()
        response = segment.propagate(response, pushes)
        ends.append(response)
    assert response is not None
    expected = -(network.end.dense() @ response.T).double()
    agree(network.segments(count, proportional=proportional), expected, 1e-3)
    asked = network.queries(torch.stack([stretch.theta for stretch in run]).mean(0)).dense()
    mean = -(asked @ torch.stack(ends).mean(0).T).double()
    agree(network.mean_end(count, proportional=proportional), mean, 1e-3)


def test_exposures_are_those_of_the_run() -> None:
    for stretch in mnist_scores.stretches(WORLD, 3, 1, [mnist_world.Moment(8, torch.zeros(1))]):
        assert float(stretch.share.sum()) == pytest.approx(1.0)
        assert len(stretch.share.unique()) > 1  # the last batch of an epoch is smaller: its rows weigh more
        assert stretch.horizon.length == pytest.approx(16 * 0.01 / 0.1)


def test_samples_in_proportion_keep_the_exact_trace(network: mnist_mlp.Network) -> None:
    """The trace of the exact Gauss-Newton matrix over all labels, and equal lengths."""
    spectrum = mnist_scores.Spectrum(WORLD, network.theta, 50)
    chances = mnist_scores.logits_of(WORLD, network.theta, WORLD.images).softmax(1)
    total = 0.0
    for label in range(4):
        drawn = mnist_scores.gradients(WORLD, network.theta, WORLD.images, torch.full((60,), label)).dense()
        total += float((drawn.square().sum(1) * chances[:, label]).sum()) / 60
    lengths = spectrum.factor.dense().square().sum(1)
    assert float(lengths.sum()) == pytest.approx(total, rel=1e-4)
    assert float(lengths.std() / lengths.mean()) < 1e-3


def test_peers_are_judged_and_what_failed_is_shown(tmp_path: Path) -> None:
    class Truth:
        def judge(self, scores: Tensor) -> float:
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
    lines = mnist_mlp.peers(tmp_path, Truth())
    assert [line["method"] for line in lines] == [
        "dattri CG, 1 network", "dattri TRAK, 5 networks", "dattri TRAK, 10 networks"
    ]  # fmt: skip
    assert [line["LDS"] for line in lines] == ["-", 0.0, 1.0]
    assert [line["error"] for line in lines] == ["TimeoutError: late", "-", "-"]
    assert mnist_mlp.peers(None, Truth()) == []


def test_what_is_handed_out_has_networks_for_many(tmp_path: Path, network: mnist_mlp.Network) -> None:
    """Those that are attributed first, and the further ones are trained as they would be alone."""
    mnist_mlp.hand_out(tmp_path, WORLD, [network], 3)
    ends = torch.load(tmp_path / "given.pt", weights_only=True)["ends"]
    assert torch.equal(ends[0], network.theta)
    agree(ends[2], flat(mnist_world.train_alone(WORLD, EVERYONE, mnist_mlp.FIRST_SEED + 2)), 1e-5)


def test_the_benchmark_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FWDATTR_CACHE", str(tmp_path))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    words = (
        "mnist_mlp.py --tiny --halves 6 --seeds 2 --removed 10 --networks 2 --samples 30 --literal 3 --sensitivity 1"
    )
    monkeypatch.setattr("sys.argv", words.split())
    mnist_mlp.main()
    import json

    rows = json.loads((tmp_path / "mnist_tiny_mlp.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [*mnist_mlp.SEVERAL, *mnist_mlp.ONE]
    left_out = {row["method"]: row["LOO Spearman"] for row in rows}
    assert left_out["three segments"] > 0.5  # rows really left out in this very run
    assert json.loads((tmp_path / "mnist_tiny_literal.json").read_text())["rows"]
    assert len(json.loads((tmp_path / "mnist_tiny_sensitivity.json").read_text())["rows"]) == 5
    assert json.loads((tmp_path / "mnist_tiny_cost.json").read_text())["rows"]


def test_the_curve_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: mnist_mlp.Network) -> None:
    score = mnist_curve.Exact(network)
    agree(score(network.queries(score.mean)), network.mean_end(mnist_curve.SEGMENTS), 1e-6)
    monkeypatch.setenv("HF_FWDATTR_CACHE", str(tmp_path))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    words = "mnist_curve.py --tiny --queries 8 --halves 4 --seeds 1 --removed 2 --networks 1 --samples 30"
    monkeypatch.setattr("sys.argv", words.split())
    mnist_curve.main()
    import json

    rows = json.loads((tmp_path / "mnist_tiny_curve.json").read_text())["rows"]
    assert [row["method"] for row in rows][:2] == ["exact", "directions alone"]
    staged = [row["of the top ten"] for row in rows if row["method"] == "two stages"]
    assert len(staged) == len(mnist_curve.BUDGETS)
    assert staged[-1] == pytest.approx(1.0)  # more passes than the tiny world has rows
    assert rows[1]["of the top ten"] <= staged[0]
