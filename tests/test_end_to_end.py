"""Fine-tunes, their banks and the pipeline, against slow definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer, pipeline

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig
from hf_fwdattr.jvp.torch_func import TorchFuncJVP
from hf_fwdattr.models.likelihood import CAUSAL_LM, SEQUENCE_CLASSIFICATION
from hf_fwdattr.pipeline import TASK
from tests.helpers.cases import CONTEXT, VOCABULARY, adapted, llama, padded
from tests.helpers.reference import agree, row_gradient
from tests.helpers.runs import (
    ROWS,
    arguments,
    ask,
    base,
    config,
    fine_tune,
    oracle,
    queries,
    saved_adapter,
    training_set,
    weights,
)


def scores(model: nn.Module, bank: Any) -> Tensor:
    return ask(model, bank).scores(queries())


def bank_of(callback: ResponseCallback) -> ResponseBank:
    assert callback.bank is not None
    return callback.bank


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ResponseBank]:
    """Model and bank of a fine-tune in which nothing is special."""
    model = adapted(base())
    return model, bank_of(fine_tune(tmp_path_factory.mktemp("plain"), model))


def test_saved_adapter_gives_the_scores_of_the_trained_model(tmp_path: Path) -> None:
    model = saved_adapter(tmp_path / "adapter")
    attribute = pipeline(TASK, model=str(tmp_path / "adapter"), device="cpu")
    bank = ResponseBank.from_pretrained(tmp_path / "adapter")
    expected = oracle(model, bank, queries())
    found = attribute.scores(queries())
    agree(found, expected, 1e-6)
    assert found.shape == (4, ROWS)
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize(
    ("spec", "live"),
    [
        ("lora_B", ["lora_B"]),
        ("lora", ["lora_A", "lora_B"]),
        ("trainable", ["lora_A", "lora_B"]),
        ([r"h\.1\..*lora_B"], ["lora_B"]),
    ],
)
def test_scores_equal_reverse_mode_for_every_choice_of_parameters(tmp_path: Path, spec: Any, live: list[str]) -> None:
    model = adapted(base())
    bank = bank_of(fine_tune(tmp_path, model, config(parameters=spec)))
    names = [parameter.name for parameter in bank.manifest.parameters]
    assert {next(word for word in name.split(".") if word.startswith("lora_")) for name in names} == set(live)
    assert all(".h.1." in name for name in names) == isinstance(spec, list)
    agree(scores(model, bank), oracle(model, bank, queries()), 1e-6)


def test_scores_equal_reverse_mode_for_a_whole_model(tmp_path: Path) -> None:
    model = llama()
    bank = bank_of(fine_tune(tmp_path, model, config(), learning_rate=1e-3))
    names = [parameter.name for parameter in bank.manifest.parameters]
    assert "lm_head.weight" in names
    assert not any("norm" in name or "embed" in name for name in names)
    agree(scores(model, bank), oracle(model, bank, queries()), 1e-5)


def test_classifier_is_attributed_through_its_class(tmp_path: Path) -> None:
    settings = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, pad_token_id=0, num_labels=3
    )
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(settings).double().eval()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return padded(rows) | {"labels": torch.tensor([len(row["input_ids"]) % 3 for row in rows])}

    callback = ResponseCallback(config(parameters="trainable"))
    Trainer(
        model=model, args=arguments(tmp_path, max_grad_norm=0), train_dataset=training_set(), data_collator=collate,
        callbacks=[callback],
    ).train()  # fmt: skip
    bank = bank_of(callback)
    assert bank.manifest.objective == "sequence-classification"
    model.eval()
    parameters, directions = bank.check_model(model), bank.directions(torch.float64)
    batch = collate(queries())
    found = TorchFuncJVP(model, parameters, SEQUENCE_CLASSIFICATION, batch).jvp(directions)
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    gradients = torch.stack([row_gradient(model, parameters, SEQUENCE_CLASSIFICATION, one) for one in single])
    agree(found[:, 0], -gradients @ directions.T, 1e-6)


SMALL: dict[str, Any] = dict(learning_rate=1e-5, max_grad_norm=0, lr_scheduler_type="linear", weight_decay=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        dict(optim="sgd"),
        dict(optim="sgd", gradient_accumulation_steps=2),
        dict(optim="sgd", gradient_accumulation_steps=4, per_device_train_batch_size=1, dataloader_drop_last=True),
        dict(optim="sgd", train_sampling_strategy="group_by_length"),
        dict(optim="sgd", dataloader_num_workers=1),
        dict(optim="sgd", max_steps=5),
    ],
    ids=["plain", "accumulated", "accumulated, drop last", "by length", "workers", "stopped early"],
)
def test_responses_add_up_to_the_movement_of_the_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With steps so small that curvature does not matter."""
    model = adapted(base())
    before = weights(model, "lora")
    bank = bank_of(fine_tune(tmp_path, model, config(parameters="lora"), **(SMALL | changes)))
    coordinates = torch.cat([block.double() for _, _, block in bank.coordinates()])
    responses = coordinates @ bank.directions(torch.float64)[: bank.manifest.directions]
    agree(responses.sum(0), weights(model, "lora") - before, 2e-3)


def test_momentum_extends_responses(tmp_path: Path) -> None:
    """A push with momentum b counts 1 / (1 - b) times; only nearly, as the end cuts the last ones short."""
    model = adapted(base())
    before = weights(model, "lora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.5)
    changes = SMALL | dict(lr_scheduler_type="constant", num_train_epochs=20, optimizers=(optimizer, None))
    bank = bank_of(fine_tune(tmp_path, model, config(parameters="lora"), **changes))
    coordinates = torch.cat([block.double() for _, _, block in bank.coordinates()])
    responses = coordinates @ bank.directions(torch.float64)[: bank.manifest.directions]
    assert bank.manifest.optimizer == "sgd"
    agree(responses.sum(0), weights(model, "lora") - before, 0.03)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (dict(optim="adamw_torch"), "adamw"),
        (dict(optim="adamw_torch", weight_decay=0.1), "adamw"),
        (dict(optim="sgd", learning_rate=0.5), "sgd"),
        (dict(optim="adamw_torch", gradient_accumulation_steps=2), "adamw"),
    ],
    ids=["AdamW", "weight decay", "SGD", "accumulated"],
)
def test_scores_equal_reverse_mode_for_every_optimizer(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    model = adapted(base())
    bank = bank_of(fine_tune(tmp_path, model, **changes))
    assert bank.manifest.optimizer == kind
    assert all(segment.weight_decay == changes.get("weight_decay", 0.0) for segment in bank.manifest.segments)
    agree(scores(model, bank), oracle(model, bank, queries()), 1e-6)


def test_unseen_row_scores_exactly_zero(tmp_path: Path) -> None:
    model = adapted(base())
    callback = fine_tune(tmp_path, model, config(directions=4), max_steps=2)
    seen = torch.unique(torch.cat(callback.recorder.record.rows)).tolist()
    assert len(seen) == 6
    found = scores(model, callback.bank)
    unseen = [row for row in range(ROWS) if row not in seen]
    assert bool((found[:, unseen] == 0).all())
    assert bool((found[:, seen] != 0).all())


def test_source_score_is_the_sum_of_its_rows(plain: tuple[nn.Module, ResponseBank]) -> None:
    attribute, data = ask(*plain), training_set()
    found = attribute({"prompt": "w3 w4", "completion": " w5 w6"})
    ids = [3, 4, 5, 6]
    (line,) = attribute.scores([{"input_ids": ids, "labels": [-100, -100, 5, 6]}])
    sums = {name: sum(float(v) for v, s in zip(line, data["source"], strict=True) if s == name) for name in SOURCES_}
    assert [source["source"] for source in found["sources"]] == sorted(sums, key=sums.__getitem__, reverse=True)
    for source in found["sources"]:
        assert source["score"] == pytest.approx(sums[source["source"]], rel=1e-4, abs=1e-6)


SOURCES_ = ["east", "north", "south"]


@pytest.mark.parametrize("size", [1, 5])
def test_batch_size_of_the_passes_does_not_change_scores(
    tmp_path: Path, plain: tuple[nn.Module, ResponseBank], size: int
) -> None:
    """Against batches of four; twelve rows are not a multiple of five."""
    model = adapted(base())
    agree(scores(model, fine_tune(tmp_path, model, config(batch_size=size)).bank), scores(*plain), 1e-6)


@pytest.mark.parametrize(("segments", "averaging"), [(1, "none"), (3, "none"), (3, "trajectory")])
def test_streamed_coordinates_equal_held_ones(tmp_path: Path, segments: int, averaging: str) -> None:
    """With fewer sample rows than rows, coordinates come from the adjoint basis."""

    def made(**changes: Any) -> tuple[nn.Module, ResponseBank]:
        model = adapted(base())
        settings = dict(segments=segments, averaging=averaging, parameters=FEW, directions=24, batch_size=16)
        chosen = config(**settings | changes)
        return model, bank_of(fine_tune(tmp_path / str(changes), model, chosen, SIZED, num_train_epochs=1))

    # Few enough parameters (24) for the sample of 36 of 40 rows to span them all.
    model, held = made(sample_rows=40)
    _, streamed = made(sample_rows=36)
    _, exact = made(directions="exact")
    assert held.manifest.size == 24
    reference = scores(model, exact)
    if averaging == "none":
        agree(reference, oracle(model, exact, queries()), 1e-5)
    agree(scores(model, held), reference, 1e-5)
    agree(scores(model, streamed), reference, 1e-5)
    one, other = (ask(model, bank)({"prompt": "w3", "completion": " w4 w5"})["sources"] for bank in (exact, streamed))
    assert [line["source"] for line in one] == [line["source"] for line in other]
    assert [line["score"] for line in other] == pytest.approx([line["score"] for line in one], rel=1e-4)


SIZED, FEW = training_set(40), [r"h\.1\..*mlp\.c_proj.*lora_B"]


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_banks_keep_half_precision_digits(
    tmp_path: Path, plain: tuple[nn.Module, ResponseBank], dtype: str, digits: float
) -> None:
    model = adapted(base())
    bank = bank_of(fine_tune(tmp_path, model, config(dtype=dtype)))
    assert bank.manifest.dtype == dtype
    agree(scores(model, bank), scores(*plain), digits)


def test_explicit_horizon_is_one_segment_at_the_end(tmp_path: Path) -> None:
    model = adapted(base()).eval()
    settings = config(horizon={"steps": 1, "step_size": 0.5}, curvature_samples=0)
    bank = bank_of(fine_tune(tmp_path, model, settings))
    assert [segment.length for segment in bank.manifest.segments] == [0.5]
    # One step without curvature is the gradient dot product, times the step and the row's share of the loss.
    parameters = bank.check_model(model)
    tokens = training_set().select_columns(["input_ids", "labels"])
    rows = [row_gradient(model, parameters, CAUSAL_LM, padded([row])) for row in tokens]
    query_gradients = [row_gradient(model, parameters, CAUSAL_LM, padded([row])) for row in queries()]
    ratio = scores(model, bank) / (torch.stack(query_gradients) @ torch.stack(rows).T)
    agree(ratio, ratio[:1].expand_as(ratio), 1e-4)
    assert bool((ratio > 0).all())


def test_defaults_suffice(tmp_path: Path) -> None:
    """128 directions of 12 rows are all of them, and without source_column there are no sources."""
    model = adapted(base(torch.float32))
    bank = bank_of(fine_tune(tmp_path, model, ResponseConfig(quiet=True)))
    assert (bank.manifest.directions, bank.manifest.source_directions, len(bank)) == (12, 0, ROWS)
    result = ask(model, bank)("w1 w2 w3", max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert result["sources"] == []
    assert len(result["tokens"]) in (1, 2, 3)
