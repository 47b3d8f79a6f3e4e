"""The exchange with other libraries on a tiny world, and the table that is made of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.peers import exchange as exchanges
from benchmarks.peers import table
from benchmarks.peers.exchange import Exchange, Result, hand_in, token_losses
from benchmarks.protocols import facts, peers
from benchmarks.protocols.peers import gradient_dot
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_fwdattr.evaluation.metrics import lds
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import CONTEXT, VOCABULARY, adapted
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import saved_base


ROWS, QUERIES = 6, 3


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    """Base, adapter, rows and queries as `peers.write_exchange` lays them out."""
    model = adapted(saved_base(tmp_path / "base", torch.float32))
    model.save_pretrained(tmp_path / "adapters" / "0")
    tokens = torch.randint(0, VOCABULARY, (ROWS + QUERIES, CONTEXT), generator=torch.Generator().manual_seed(0))
    save_file({"rows": tokens[:ROWS].clone(), "queries": tokens[ROWS:].clone()}, tmp_path / "tokens.safetensors")
    return Exchange(tmp_path)


def truth(exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Halves and outcomes (seeds, subsets, queries)."""
    generator = torch.Generator().manual_seed(1)
    halves = torch.rand(8, ROWS, generator=generator) < 0.5
    return halves, torch.randn(2, 8, QUERIES, generator=generator, dtype=torch.float64)


def evaluated(exchange: Exchange, halves: Tensor, outcomes: Tensor) -> list[dict[str, Any]]:
    return table.judged(exchange, lambda scores: peers.judge(scores, halves, outcomes))


def judged_facts(exchange: Exchange) -> list[dict[str, Any]]:
    return table.judged(exchange, lambda scores: facts.judge(scores, facts.teachers(exchange)))


def add(exchange: Exchange, name: str, scores: Tensor, shipped: bool = False, method: str = "made up") -> None:
    hand_in(exchange, name, lambda: Result(scores, 1.0, 0.5, 8.0), peer="none", method=method, setting=name,
            shipped=shipped, backward="query")  # fmt: skip


def test_gradient_dot_product_through_the_exchange(exchange: Exchange) -> None:
    """Scores and LDS are those of plain autograd on the model that was handed out."""
    hand_in(exchange, "dot", lambda: gradient_dot(exchange), peer="baseline", method="dot", setting="end",
            shipped=True, backward="query")  # fmt: skip
    model = exchange.model()
    parameters = TrackedParameters.of(model, "lora")

    def gradients(tokens: Tensor) -> Tensor:
        singles = [{"input_ids": line[None], "labels": line[None]} for line in tokens]
        return torch.stack([row_gradient(model, parameters, CAUSAL_LM, single) for single in singles])

    expected = gradients(exchange.queries) @ gradients(exchange.rows).T
    halves, outcomes = truth(exchange)
    (record,) = evaluated(exchange, halves, outcomes)
    agree(load_file(exchange.folder / "scores" / "dot.safetensors")["scores"], expected, 1e-4)
    assert record["LDS"] == pytest.approx(lds(expected, halves, outcomes.mean(0)).mean)
    assert record["row_bytes"] == 4 * parameters.size
    printed = table.line(record, peers.FIGURES)
    assert (printed["LDS"], printed["backward"]) == (record["LDS"], "query")


def test_rows_of_many_lengths_through_the_exchange(exchange: Exchange) -> None:
    """Padded on the right and partly supervised, as each by itself; teachers are found by where they stand."""
    lists = [([1, 5, 3], [-100, 5, 3]), ([4, 2, 6, 3, 5], [-100, -100, -100, 3, 5]), ([7, 1], [7, 1])]
    tokens, labels = facts.padded(lists)
    assert tokens.shape == labels.shape == (3, 5)
    assert [facts.used(line) for line in labels.tolist()] == [3, 5, 2]
    given = {"rows": tokens, "row_labels": labels, "queries": tokens[:2].clone(), "query_labels": labels[:2].clone()}
    save_file(given, exchange.folder / "tokens.safetensors")
    exchange = Exchange(exchange.folder)
    model = exchange.model()
    alone = [token_losses(model, torch.tensor([ids]), torch.tensor([own])).sum() for ids, own in lists]
    agree(token_losses(model, exchange.rows, exchange.row_labels).sum(1), torch.stack(alone), 1e-5)
    parameters = TrackedParameters.of(model, "lora")
    singles = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([own])} for ids, own in lists]
    gradients = torch.stack([row_gradient(model, parameters, CAUSAL_LM, single) for single in singles])
    agree(gradient_dot(exchange).scores, gradients[:2] @ gradients.T, 1e-4)

    known = {"texts": [], "questions": 4, "facts": [{"rows": [0]}, {"rows": [1, 2]}]}
    (exchange.folder / "facts.json").write_text(json.dumps(known))
    assert facts.teachers(exchange).tolist() == [[True, False, False], [False, True, True]]
    add(exchange, "good", torch.tensor([[3.0, 2, 1], [1, 3, 2]]))
    add(exchange, "half", torch.tensor([[3.0, 2, 1], [3, 2, 1]]))
    add(exchange, "nan", torch.full((2, 3), torch.nan))
    lines = [table.line(record, facts.FIGURES) for record in judged_facts(exchange)]
    assert [line["setting"] for line in lines] == ["good", "half", "nan"]
    assert [line["first"] for line in lines] == [1.0, 0.5, "-"]
    assert [line["MRR"] for line in lines] == [1.0, 0.75, "-"]
    assert "not finite" in lines[2]["backward"]
    assert [record["setting"] for record in table.chosen(judged_facts(exchange), "MRR")] == ["good", "nan"]


def test_model_of_the_adapter_alone_computes_the_same(exchange: Exchange) -> None:
    whole, alone = exchange.model(), exchange.model(only_adapter=True)
    names = [name for name, _ in alone.named_parameters()]
    assert names == [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora_" in name for name in names)
    agree(token_losses(alone, exchange.rows), token_losses(whole, exchange.rows), 1e-6)


def test_failed_methods_are_shown_with_their_error(exchange: Exchange, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Result:
        raise RuntimeError("no such thing in /some/folder/of/a/machine.so")

    hand_in(exchange, "broken", broken, peer="none", method="broken", setting="defaults", shipped=True,
            backward="query")  # fmt: skip
    add(exchange, "turned", torch.ones(ROWS, QUERIES), shipped=True, method="turned")
    add(exchange, "nan", torch.full((QUERIES, ROWS), torch.nan), shipped=True, method="nan")
    records = {record["setting"]: record for record in evaluated(exchange, *truth(exchange))}
    assert records["defaults"]["error"] == "RuntimeError: no such thing in .../machine.so"
    assert "(queries, rows) = (3, 6)" in records["turned"]["error"]
    assert "not finite" in records["nan"]["error"]
    assert "Traceback" in capsys.readouterr().err
    lines = [table.line(record, peers.FIGURES) for record in table.chosen(list(records.values()))]
    assert [line["LDS"] for line in lines] == ["-"] * 3
    assert all(line.keys() == lines[0].keys() for line in lines)


def test_table_shows_the_shipped_setting_and_the_best_one(exchange: Exchange) -> None:
    halves, outcomes = truth(exchange)
    # Scores that predict the outcomes best: least squares of the negated losses on the halves.
    best = torch.linalg.lstsq(halves.double(), -outcomes.mean(0)).solution.T
    add(exchange, "as shipped", -best, shipped=True)
    add(exchange, "tuned", best)
    add(exchange, "neither", torch.zeros(QUERIES, ROWS))
    rows = table.chosen(evaluated(exchange, halves, outcomes))
    assert [row["setting"] for row in rows] == ["tuned", "as shipped"]
    for number, setting in enumerate(("worse", "better")):  # nobody ships this one: the best setting stands alone
        add(exchange, setting, best * (2 * number - 1), method="never shipped")
    assert [row["setting"] for row in table.chosen(evaluated(exchange, halves, outcomes))].count("worse") == 0
    assert rows[0]["LDS"] == pytest.approx(-rows[1]["LDS"])


def test_same_failure_of_several_settings_is_shown_once(exchange: Exchange) -> None:
    def failing(message: str) -> Callable[[], Result]:
        def run() -> Result:
            raise RuntimeError(message)

        return run

    for name, message in (("a", "one"), ("b", "one"), ("c", "another")):
        hand_in(exchange, name, failing(message), peer="none", method="made up", setting=name, backward="query")
    add(exchange, "d", torch.zeros(QUERIES, ROWS), shipped=True)
    rows = table.chosen(evaluated(exchange, *truth(exchange)))
    assert [(row["setting"], row["error"]) for row in rows] == [
        ("d", None), ("a", "RuntimeError: one"), ("c", "RuntimeError: another")
    ]  # fmt: skip


def test_finished_method_is_not_run_again(exchange: Exchange) -> None:
    add(exchange, "once", torch.zeros(QUERIES, ROWS))
    add(exchange, "once", torch.ones(QUERIES, ROWS))
    assert not load_file(exchange.folder / "scores" / "once.safetensors")["scores"].any()
    assert json.loads((exchange.folder / "scores" / "once.json").read_text())["models"] == 1


def test_only_named_methods_are_run(exchange: Exchange) -> None:
    exchange.only = ["this"]
    add(exchange, "that", torch.zeros(QUERIES, ROWS))
    add(exchange, "this", torch.zeros(QUERIES, ROWS))
    assert [path.stem for path in (exchange.folder / "scores").glob("*.json")] == ["this"]


def test_late_method_is_shown_with_a_timeout(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "MINUTES", 1 / 60)
    hand_in(exchange, "slow", lambda: time.sleep(30), peer="none", method="slow", setting="slow", backward="query")
    (record,) = evaluated(exchange, *truth(exchange))
    assert record["error"].startswith("TimeoutError: not done after")
