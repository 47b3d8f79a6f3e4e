"""Banks of means over the run, against the responses after each segment and reverse mode at the mean weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr import ResponseBank, ResponseCallback, build_bank
from hf_fwdattr.errors import BankError
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import Parameters
from hf_fwdattr.query.batch import batch_scores
from hf_fwdattr.response.averaging import shares
from hf_fwdattr.response.dataset import TrainingRows
from hf_fwdattr.response.passes import Passes
from hf_fwdattr.response.storage import Storage
from hf_fwdattr.trainer.record import Record, Snapshot
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import ROWS, ask, base, config, fine_tune, queries, trainer_for, training_set, weights


Run = tuple[nn.Module, Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fine-tuned model, and the record of three segments."""
    folder = tmp_path_factory.mktemp("run")
    model, callback = adapted(base()), ResponseCallback(config(parameters="lora"))
    trainer_for(folder, model, training_set(), callback).train()
    callback.recorder.record.save(folder / "record")
    return model.eval(), folder / "record"


def built(run: Run, **changes: Any) -> ResponseBank:
    settings = config(**({"parameters": "lora", "averaging": "trajectory"} | changes))
    return build_bank(run[0], training_set(), settings, data_collator=padded, record=run[1])


def responses(bank: ResponseBank) -> Tensor:
    """(rows, P) in the bank."""
    rows = torch.cat([block.double() for _, _, block in bank.coordinates()])
    return rows @ bank.directions(torch.float64)[: bank.manifest.directions]


def slow(run: Run) -> tuple[Tensor, Tensor]:
    """(rows, P) mean of what shorter runs end in, each with passes of its own; (P,) mean of the middles' weights."""
    model, record = run[0], Record.load(run[1])
    parameters = Parameters.of(model, "lora")
    theta = parameters.read(model)
    segments = record.build(ROWS, Snapshot(len(record.rates), theta, torch.ones_like(theta)))
    dataset = training_set().select_columns(["input_ids", "labels"])
    found = []
    for count in (1, 2, 3):
        with Storage(1 << 30) as storage:
            rows = TrainingRows(dataset, padded, 4, "cpu", None, None)
            passes = Passes(model, parameters, CAUSAL_LM, rows, segments[:count], theta, storage, quiet=True)
            passes.measure_curvature(ROWS)
            found.append(passes.respond(torch.arange(ROWS), torch.zeros(ROWS, parameters.size, dtype=theta.dtype)))
    parameters.write(model, theta)
    return sum(found) / 3, torch.stack([segment.theta for segment in segments]).mean(0)  # type: ignore[return-value]


def at_mean_weights(run: Run, theta: Tensor) -> Tensor:
    """(queries, P) gradients of the queries' losses there, by reverse mode."""
    model = run[0]
    parameters = Parameters.of(model, "lora")
    own = parameters.read(model)
    parameters.write(model, theta)
    found = [row_gradient(model, parameters, CAUSAL_LM, padded([query])) for query in queries()]
    parameters.write(model, own)
    return torch.stack(found).double()


def test_scores_are_the_mean_response_read_at_the_mean_weights(run: Run) -> None:
    expected, theta = slow(run)
    bank, before = built(run), weights(run[0])
    agree(responses(bank), expected, 1e-5)
    found = ask(run[0], bank).scores(queries())
    agree(found, -at_mean_weights(run, theta) @ expected.double().T, 1e-5)
    last = ask(run[0], built(run, averaging="none")).scores(queries())
    assert float((found - last).norm() / last.norm()) > 0.1
    assert torch.equal(weights(run[0]), before)


def test_sources_add_up_and_differences_agree(run: Run) -> None:
    bank = built(run)
    owner = torch.cat([sources for _, sources, _ in bank.coordinates()]).long()
    scores = ask(run[0], bank).scores(queries()).double()
    summed = torch.stack([scores[:, owner == source].sum(1) for source in range(3)], dim=1)
    agree(ask(run[0], bank).source_scores(queries()), summed, 1e-4)
    agree(ask(run[0], bank, readout="difference").scores(queries()), scores.float(), 1e-3)


def test_both_stages_are_read_there(run: Run) -> None:
    bank = built(run, directions=4)
    assert bank.manifest.row_codes == ROWS
    whole, theta = slow(run)
    exact = -at_mean_weights(run, theta) @ whole.double().T
    reader = ask(run[0], bank)._reader
    for query, expected in zip(queries(), exact, strict=True):
        agree(reader.rank(query, ROWS, 100)[1], expected, 2e-2)  # all rows' own responses, in eight bits
    one_pass = reader.scores(queries(), budget=1).double()
    assert float((one_pass - exact).norm() / exact.norm()) < 0.8
    parameters, live = bank.check_model(run[0]), weights(run[0])
    with bank.query_weights(run[0], parameters):
        assert reader._first_look is not None
        there = reader._first_look(padded(queries()))
    rows = torch.cat([block.decode() for block in bank.row_codes()])
    agree(one_pass, (there @ rows.T).double(), 1e-5)
    assert torch.equal(weights(run[0]), live)


def test_batches_are_read_there(run: Run) -> None:
    bank = built(run)
    agree(batch_scores(run[0], bank, padded(queries())), ask(run[0], bank).scores(queries()), 1e-5)


def test_the_models_weights_come_back_from_a_read_that_fails(run: Run) -> None:
    bank, before = built(run), weights(run[0])

    def interrupted() -> None:
        with bank.query_weights(run[0], bank.check_model(run[0])):
            assert not torch.equal(weights(run[0]), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(weights(run[0]), before)


def test_the_papers_form_has_one_end(run: Run) -> None:
    """Its only segment is the end itself, so that the mean over ends changes nothing."""
    assert shares("trajectory", 1) == shares("none", 1) == [1.0]
    assert shares("none", 3) == [0.0, 0.0, 1.0]
    assert sum(shares("trajectory", 7)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'none' or 'trajectory'"):
        shares("first", 3)
    horizon = {"steps": 3, "step_size": 0.1}
    one, other = (
        ask(run[0], built(run, averaging=e, horizon=horizon)).scores(queries()) for e in ("none", "trajectory")
    )
    agree(one, other, 1e-6)


def test_a_bank_says_where_it_is_read(run: Run, tmp_path: Path) -> None:
    bank = built(run)
    bank.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "fwdattr" / "bank.json").read_text())
    assert told["averaging"] == told["config"]["averaging"] == "trajectory"
    agree(
        ask(run[0], ResponseBank.from_pretrained(tmp_path)).scores(queries()),
        ask(run[0], bank).scores(queries()),
        1e-9,
    )
    (shard,) = (tmp_path / "fwdattr").glob("weights-*")
    shard.unlink()
    with pytest.raises(BankError, match="is missing"):
        ResponseBank.from_pretrained(tmp_path)


def test_the_self_check_reads_there_too(tmp_path: Path) -> None:
    """Plain descent in small steps: source by source, the mean over the run ranks as the end does."""
    run = dict(optim="sgd", learning_rate=0.05, num_train_epochs=2, max_grad_norm=0.0)
    callback = fine_tune(
        tmp_path, adapted(base()), config(self_check=2, parameters="lora", averaging="trajectory"), **run
    )
    assert callback.bank is not None
    found = json.loads((tmp_path / "fwdattr" / "bank.json").read_text())["quality"]["self_check"]
    assert found["pearson"] > 0.85
    assert found["slope"] > 1.0  # half-way through the run there is less to see
