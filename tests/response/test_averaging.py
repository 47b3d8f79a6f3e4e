"""Trajectory averaging, against the responses after each segment and reverse mode at the mean weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr import ResponseBank, ResponseCallback, build_bank
from hf_fwdattr.errors import BankError
from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.query.batch import batch_scores
from hf_fwdattr.response.averaging import segment_weights
from hf_fwdattr.response.dataset import TrainingRows
from hf_fwdattr.response.gradient_stream import GradientStream
from hf_fwdattr.response.passes import Passes
from hf_fwdattr.response.storage import Storage
from hf_fwdattr.trainer.record import Record, Snapshot
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import ROWS, ask, base, config, fine_tune, queries, trainer_for, training_set, weights


Run = tuple[nn.Module, Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a fine-tuned model and the record of three segments."""
    folder = tmp_path_factory.mktemp("run")
    model, callback = adapted(base()), ResponseCallback(config(parameters="lora"))
    trainer_for(folder, model, training_set(), callback).train()
    callback.recorder.record.save(folder / "record")
    return model.eval(), folder / "record"


def built(run: Run, **changes: Any) -> ResponseBank:
    settings = config(**({"parameters": "lora", "averaging": "trajectory"} | changes))
    return build_bank(run[0], training_set(), settings, data_collator=padded, record=run[1])


def responses(bank: ResponseBank) -> Tensor:
    """Return the responses (rows, P) in the bank."""
    rows = torch.cat([block.double() for _, _, block in bank.coordinates()])
    return rows @ bank.directions(torch.float64)[: bank.manifest.directions]


def slow(run: Run) -> tuple[Tensor, Tensor]:
    """Return the mean response (rows, P) of runs of one, two and three segments, and the mean weights (P,)."""
    model, record = run[0], Record.load(run[1])
    parameters = TrackedParameters.of(model, "lora")
    theta = parameters.read(model)
    segments = record.build(ROWS, Snapshot(len(record.rates), theta, torch.ones_like(theta)))
    dataset = training_set().select_columns(["input_ids", "labels"])
    by_end = []
    for count in (1, 2, 3):
        with Storage(1 << 30) as storage:
            stream = GradientStream(model, parameters, CAUSAL_LM, TrainingRows(dataset, padded, 4), quiet=True)
            passes = Passes(stream, segments[:count], theta, storage)
            passes.measure_curvature(ROWS)
            by_end.append(passes.respond(torch.arange(ROWS), torch.zeros(ROWS, parameters.size, dtype=theta.dtype)))
    parameters.write(model, theta)
    return sum(by_end) / 3, torch.stack([segment.theta for segment in segments]).mean(0)  # type: ignore[return-value]


def at_mean_weights(run: Run, theta: Tensor) -> Tensor:
    """Return the gradients (queries, P) of the queries' losses at these weights, by reverse mode."""
    model = run[0]
    parameters = TrackedParameters.of(model, "lora")
    trained = parameters.read(model)
    parameters.write(model, theta)
    gradients = [row_gradient(model, parameters, CAUSAL_LM, padded([query])) for query in queries()]
    parameters.write(model, trained)
    return torch.stack(gradients).double()


def test_averaged_scores_are_mean_responses_read_at_the_mean_weights(run: Run) -> None:
    expected, theta = slow(run)
    bank, before = built(run), weights(run[0])
    agree(responses(bank), expected, 1e-5)
    averaged = ask(run[0], bank).scores(queries())
    agree(averaged, -at_mean_weights(run, theta) @ expected.double().T, 1e-5)
    last = ask(run[0], built(run, averaging="none")).scores(queries())
    assert float((averaged - last).norm() / last.norm()) > 0.1
    assert torch.equal(weights(run[0]), before)


def test_averaged_source_scores_are_sums_of_rows_for_both_readouts(run: Run) -> None:
    bank = built(run)
    source_of_row = torch.cat([sources for _, sources, _ in bank.coordinates()]).long()
    scores = ask(run[0], bank).scores(queries()).double()
    summed = torch.stack([scores[:, source_of_row == source].sum(1) for source in range(3)], dim=1)
    agree(ask(run[0], bank).source_scores(queries()), summed, 1e-4)
    agree(ask(run[0], bank, readout="difference").scores(queries()), scores.float(), 1e-3)


def test_both_stages_read_at_the_mean_weights(run: Run) -> None:
    bank = built(run, directions=4)
    assert bank.manifest.row_codes == ROWS
    whole, theta = slow(run)
    exact = -at_mean_weights(run, theta) @ whole.double().T
    scorer = ask(run[0], bank).scorer
    for query, expected in zip(queries(), exact, strict=True):
        agree(scorer.rank(query, ROWS, 100).scores, expected, 2e-2)  # row codes have eight bits
    one_pass = scorer.scores(queries(), budget=1).double()
    assert float((one_pass - exact).norm() / exact.norm()) < 0.8
    parameters, before = bank.check_model(run[0]), weights(run[0])
    with bank.query_weights(run[0], parameters):
        predictor = GradientPredictor(run[0], parameters, CAUSAL_LM, bank.error_projections())
        predicted = predictor(padded(queries()))
    rows = torch.cat([block.decode() for block in bank.row_codes()])
    agree(one_pass, (predicted @ rows.T).double(), 1e-5)
    assert torch.equal(weights(run[0]), before)


def test_batch_scores_read_at_the_mean_weights(run: Run) -> None:
    bank = built(run)
    agree(batch_scores(run[0], bank, padded(queries())), ask(run[0], bank).scores(queries()), 1e-5)


def test_model_weights_are_restored_after_a_failed_read(run: Run) -> None:
    bank, before = built(run), weights(run[0])

    def interrupted() -> None:
        with bank.query_weights(run[0], bank.check_model(run[0])):
            assert not torch.equal(weights(run[0]), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(weights(run[0]), before)


def test_segment_weights_sum_to_one() -> None:
    assert segment_weights("trajectory", 1) == segment_weights("none", 1) == [1.0]
    assert segment_weights("none", 3) == [0.0, 0.0, 1.0]
    assert sum(segment_weights("trajectory", 7)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'none' or 'trajectory'"):
        segment_weights("first", 3)


def test_averaging_does_not_change_explicit_horizons(run: Run) -> None:
    """An explicit horizon has one segment, at the end."""
    horizon = {"steps": 3, "step_size": 0.1}
    one, other = (
        ask(run[0], built(run, averaging=e, horizon=horizon)).scores(queries()) for e in ("none", "trajectory")
    )
    agree(one, other, 1e-6)


def test_banks_keep_their_averaged_weights(run: Run, tmp_path: Path) -> None:
    bank = built(run)
    bank.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "fwdattr" / "bank.json").read_text())
    assert manifest["averaging"] == manifest["config"]["averaging"] == "trajectory"
    agree(
        ask(run[0], ResponseBank.from_pretrained(tmp_path)).scores(queries()),
        ask(run[0], bank).scores(queries()),
        1e-9,
    )
    (shard,) = (tmp_path / "fwdattr").glob("averaged_weights-*")
    shard.unlink()
    with pytest.raises(BankError, match="is missing"):
        ResponseBank.from_pretrained(tmp_path)


def test_self_check_reads_at_the_mean_weights(tmp_path: Path) -> None:
    """In plain descent by small steps, averaged scores rank sources as those of the end do."""
    run = dict(optim="sgd", learning_rate=0.05, num_train_epochs=2, max_grad_norm=0.0)
    callback = fine_tune(
        tmp_path, adapted(base()), config(self_check=2, parameters="lora", averaging="trajectory"), **run
    )
    assert callback.bank is not None
    result = json.loads((tmp_path / "fwdattr" / "bank.json").read_text())["quality"]["self_check"]
    assert result["pearson"] > 0.85
    assert result["slope"] > 1.0  # half-way through the run there is less to see
