"""A training loop over Accelerate: the example in the recorder's docstring is run, and compared with the Trainer."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseRecorder
from hf_fwdattr.errors import UnsupportedError
from tests.helpers.cases import adapted, padded
from tests.helpers.reference import agree
from tests.helpers.runs import ROWS, ask, base, config, queries, trainer_for, training_set, weights


STEPS = 12


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(ResponseRecorder) or "", flags=re.DOTALL)
    return str(code)


def run_loop(folder: Path, code: str, batch_size: int, data: Any = None, **more: Any) -> dict[str, Any]:
    """The names that the example leaves behind."""
    model = adapted(base()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    rows: Any = training_set() if data is None else data
    given: dict[str, Any] = {
        "Accelerator": Accelerator, "ResponseRecorder": ResponseRecorder, "config": config(), "folder": folder,
        "model": model, "optimizer": optimizer, "steps": STEPS, "epochs": 3,
        "loader": DataLoader(rows, batch_size=batch_size, collate_fn=plain),
        "scheduler": get_linear_schedule_with_warmup(optimizer, 0, STEPS),
    }  # fmt: skip
    given |= more
    exec(compile(code, "docstring", "exec"), given)
    return given


def plain(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the Trainer does by itself: columns that are not the model's are left out."""
    return padded([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def test_example_gives_the_bank_of_the_trainer(tmp_path: Path) -> None:
    """Without accumulation, and with no first token to be learnt, the mean over a batch is the same in both loops."""
    data = training_set().map(lambda row: {"labels": [-100, *row["labels"][1:]]})
    model, callback = adapted(base()).train(), ResponseCallback(config())
    trainer_for(
        tmp_path / "trainer", model, data, callback, train_sampling_strategy="sequential", max_grad_norm=1.0
    ).train()
    code = example().replace("gradient_accumulation_steps=2", "gradient_accumulation_steps=1")
    own = run_loop(tmp_path / "loop", code, 3, data)
    bank = ResponseBank.from_pretrained(tmp_path / "loop")
    assert bank.manifest == own["bank"].manifest
    agree(weights(own["model"]), weights(model), 1e-9)
    agree(ask(own["model"], bank).scores(queries()), ask(model, callback.bank).scores(queries()), 1e-6)


def test_example_records_weights_and_rates(tmp_path: Path) -> None:
    """Two micro-batches of two rows: each row weighs 1 / (2 tokens of its micro-batch), times what clipping left."""
    own = run_loop(tmp_path, example(), 2)
    record, data = own["recorder"].record, training_set()
    tokens = [sum(label != -100 for label in labels[1:]) for labels in data["labels"]]
    assert [rows.tolist() for rows in record.rows] == [[i, i + 1, i + 2, i + 3] for i in (0, 4, 8)] * 3
    for rows, row_weights in zip(record.rows, record.weights, strict=True):
        pairs = [tokens[a] + tokens[b] for a, b in rows.view(2, 2).tolist()]
        assert row_weights.tolist() == pytest.approx([1 / (2 * pair) for pair in pairs for _ in range(2)])
    assert record.rates == pytest.approx([1e-2 * (1 - step / STEPS) for step in range(9)])
    assert not hasattr(own["model"], "fwdattr")
    assert "clip_grad_norm_" not in vars(own["accelerator"])
    assert not own["model"]._forward_hooks


def test_resumed_loop_gives_the_same_bank(tmp_path: Path) -> None:
    """After the first epoch the record goes through a folder, and another recorder goes on with it."""
    code = example().replace("range(epochs)", "turns()")
    given: dict[str, Any] = {}

    def whole() -> Iterator[int]:
        yield from range(3)

    def cut() -> Iterator[int]:
        yield 0
        recorder = given["recorders"][-1]
        recorder.save(tmp_path / "record")
        recorder.detach()
        given["recorders"].append(ResponseRecorder(**recorder.arguments | {"resume": tmp_path / "record"}))
        given["recorders"][-1].describe_run(captures=tmp_path / "captures")
        yield from range(2)

    class Kept(ResponseRecorder):
        """The latest one that was made does the work."""

        def __init__(self, config: Any, **arguments: Any):
            super().__init__(config, **arguments)
            self.describe_run(captures=tmp_path / "captures")
            self.arguments = arguments | {"config": config}
            given["recorders"] = [self]

        def step(self) -> None:
            super().step() if given["recorders"][-1] is self else given["recorders"][-1].step()

        def finish(self, folder: Any, **more: Any) -> Any:
            last = given["recorders"][-1]
            return super().finish(folder, **more) if last is self else last.finish(folder, **more)

    one = run_loop(tmp_path / "whole", code, 2, turns=whole)
    other = run_loop(tmp_path / "parts", code, 2, turns=cut, ResponseRecorder=Kept)
    assert len(given["recorders"]) == 2
    assert torch.equal(
        ask(other["model"], other["bank"]).scores(queries()), ask(one["model"], one["bank"]).scores(queries())
    )


def scaled(**settings: Any) -> Any:
    """An Accelerator as with fp16, which it does on GPUs only: the gradient scaler is real, and works on a CPU. Only
    that scales are taken out before clipping is left to the loop.
    """

    def make(**more: Any) -> Accelerator:
        accelerator = Accelerator(**more)
        accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
        return accelerator

    return make


CLIPS = "accelerator.clip_grad_norm_("
UNSCALED = example().replace(CLIPS, f"accelerator.scaler.unscale_(optimizer.optimizer); {CLIPS}")


def test_gradient_scaler_changes_nothing(tmp_path: Path) -> None:
    plain = run_loop(tmp_path / "plain", example(), 2)
    other = run_loop(tmp_path / "scaled", UNSCALED, 2, Accelerator=scaled(init_scale=2.0**10, growth_interval=2))
    assert other["accelerator"].scaler.get_scale() > 2.0**12
    agree(weights(other["model"]), weights(plain["model"]), 1e-9)
    one, two = (ask(run["model"], run["bank"]).scores(queries()) for run in (other, plain))
    agree(one, two, 1e-6)


def test_step_that_the_scaler_skips_has_rate_zero(tmp_path: Path) -> None:
    """The first step's gradients overflow: it is not taken, and its rows are as if never seen in it."""

    def overflow(model: Any, recorder: ResponseRecorder) -> None:
        weight = next(p for p in model.parameters() if p.requires_grad)
        weight.register_hook(lambda gradient: gradient * (float("inf") if recorder.taken == 0 else 1.0))

    code = UNSCALED.replace("for _ in", "overflow(model, recorder)\nfor _ in")
    run = run_loop(tmp_path, code, 2, Accelerator=scaled(), overflow=overflow)
    record = run["recorder"].record
    assert record.rates[0] == 0.0
    assert min(record.rates[1:]) > 0.0
    start, stop = record.bounds()[0]
    (segment, *_) = record.build(ROWS, record.end)
    expected = {int(row) for rows in record.rows[start + 1 : stop] for row in rows}
    assert set(segment.row_weights.nonzero().flatten().tolist()) == expected
    assert bool(torch.isfinite(ask(run["model"], run["bank"]).scores(queries())).all())


def test_losses_and_clipping_that_are_not_recorded_are_refused(tmp_path: Path) -> None:
    other = "(model(**batch).logits.square().mean())"
    with pytest.raises(UnsupportedError, match="does not use the loss that the model returns"):
        run_loop(tmp_path, example().replace("model(**batch).loss", other), 2)
    with pytest.raises(UnsupportedError, match="clip_grad_value_"):
        run_loop(tmp_path, example().replace("clip_grad_norm_", "clip_grad_value_"), 2)
    part = "[p for n, p in model.named_parameters() if 'h.0' in n]"
    with pytest.raises(UnsupportedError, match="clipped apart from others"):
        run_loop(tmp_path, example().replace("model.parameters()", part), 2)


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (
            Namespace(state=Namespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1))),
            r"it flattens weights.*\(FSDP1\)",
        ),
        (
            Namespace(state=Namespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True))),
            "cpu_offload of FSDP",
        ),
        (Namespace(parallelism_config=ParallelismConfig(tp_size=2)), "2 ranks share every row"),
    ],
    ids=["FSDP1", "offloaded", "tensor parallel"],
)
@pytest.mark.filterwarnings("ignore:FSDP1 is deprecated")
def test_other_kinds_of_sharding_are_refused(accelerator: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ResponseRecorder(
            config(), accelerator=accelerator, model=adapted(base()), optimizer=None, dataloader=None, steps=1
        )
