"""Conservation: under SGD with small steps, the scores of all rows sum to what training changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForSequenceClassification

from hf_fwdattr import ResponseCallback
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.models.likelihood import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Objective
from hf_fwdattr.query.batch import batch_scores
from tests.helpers.cases import adapted, llama, padded, projections, token_rows
from tests.helpers.reference import agree
from tests.helpers.runs import base, config, fine_tune, losses, training_set


SMALL_STEPS: dict[str, Any] = dict(optim="sgd", learning_rate=1e-3, max_grad_norm=0)


def labelled(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch with one label, or several, for a whole row."""
    tokens = padded([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
    return tokens | {"labels": torch.tensor([row["labels"] for row in rows])}


def classifier() -> Any:
    settings = llama().config.to_dict() | {"num_labels": 3, "pad_token_id": 0, "id2label": None, "label2id": None}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(type(llama().config)(**settings)).double()


def multi_label(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The objective of the trainer's README: each label is a choice between 0 and 1."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    return torch.stack([torch.zeros_like(logits), logits], -1), batch["labels"].long()


def changed_and_scored(
    folder: Path, model: Any, settings: Any, rows: Any, objective: Objective, collate: Any, **how: Any
) -> tuple[Tensor, Tensor, ResponseCallback]:
    """(what training changed of a few rows' log-likelihood, the sums of their scores, the callback)."""
    some = [rows[index] for index in range(4)]
    before = losses(model, some, objective, collate)
    callback = fine_tune(folder, model, settings, rows, collate=collate, **(SMALL_STEPS | how))
    assert callback.bank is not None
    changed = before - losses(model, some, objective, collate)
    scored = [batch_scores(model, callback.bank, collate([row]), objective).sum() for row in some]
    return changed, torch.stack(scored), callback


def with_second_adapter() -> PeftModel:
    model = adapted(base())
    second = LoraConfig(r=2, lora_alpha=4, target_modules=projections(model.get_base_model()), fan_in_fan_out=True)
    model.add_adapter("second", second)
    model.set_adapter("second")
    return model.double()


@pytest.mark.parametrize(
    ("make", "spec"),
    [(lambda: adapted(base(), trainable_token_indices=[1, 2, 5]), "trainable"), (with_second_adapter, "lora")],
    ids=["tokens of a tied embedding", "second of two adapters"],
)
def test_scores_of_trained_adapters_sum_to_the_change(tmp_path: Path, make: Any, spec: str) -> None:
    changed, scored, _ = changed_and_scored(
        tmp_path, make(), config(parameters=spec), training_set(), CAUSAL_LM, padded
    )
    agree(scored, changed, 0.02)


def test_new_head_of_a_classifier_responds_by_default(tmp_path: Path) -> None:
    """With LoRA's A frozen, what is tracked by default is all that is trained."""
    model = get_peft_model(
        classifier(), LoraConfig(r=2, target_modules=projections(llama()), task_type="SEQ_CLS")
    ).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    rows: Any = [{"input_ids": row["input_ids"], "labels": index % 3} for index, row in enumerate(token_rows(12))]
    how: dict[str, Any] = dict(objective=SEQUENCE_CLASSIFICATION, collate=labelled)
    changed, scored, callback = changed_and_scored(tmp_path, model, config(source_column=None), rows, **how)
    assert callback.recorder.parameters.names[-1] == "score.weight"
    agree(scored, changed, 0.02)


def test_several_labels_are_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    rows: Any = [
        {"input_ids": row["input_ids"], "labels": [float(index % 2), float(index % 3 == 0), 1.0]}
        for index, row in enumerate(token_rows(12))
    ]
    settings = dict(source_column=None, parameters="linear")
    model = classifier()
    with pytest.raises(
        UnsupportedError, match=r"labels: torch.float\d+, of shape \(4, 3\).*ResponseConfig\(objective="
    ):
        fine_tune(tmp_path, model, config(**settings), rows, collate=labelled)
    model = classifier()
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    objective = Objective("custom", multi_label)
    changed, scored, _ = changed_and_scored(
        tmp_path, model, config(objective=multi_label, **settings), rows, objective, labelled
    )
    agree(scored, changed, 0.02)


def test_small_noise_of_neftune_is_left_out_and_large_noise_refused(tmp_path: Path) -> None:
    """The noise is a third of the embeddings' size; scores are those of the network without it."""
    model = adapted(base())
    torch.manual_seed(4)
    how: dict[str, Any] = dict(neftune_noise_alpha=0.5, num_train_epochs=10, learning_rate=3e-4)
    changed, scored, _ = changed_and_scored(
        tmp_path, model, config(parameters="lora"), training_set(), CAUSAL_LM, padded, **how
    )
    agree(scored, changed, 0.3)
    with pytest.raises(UnsupportedError, match=r"neftune_noise_alpha=5: its noise is 3\.1 times.* at most 0\.7"):
        fine_tune(tmp_path, adapted(base()), config(), neftune_noise_alpha=5.0)


def test_trained_weights_that_are_left_out_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick: dict[str, Any] = dict(gradient_predictor=False, segments=1, directions=2)
    tokens: dict[str, Any] = dict(trainable_token_indices=[1, 2, 5])
    fine_tune(tmp_path, adapted(base(), **tokens), config(**quick), max_steps=1)
    (message,) = [message for message in caplog.messages if "leaves out" in message]
    assert "leaves out 1 trained matrices: transformer.wte.token_adapter.trainable_tokens_delta" in message
    caplog.clear()
    fine_tune(tmp_path, adapted(base()), config(**quick), max_steps=1)
    fine_tune(tmp_path, adapted(base(), **tokens), config(parameters="lora_B", **quick), max_steps=1)
    assert not [message for message in caplog.messages if "leaves out" in message]


def test_different_weight_decays_are_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    how: dict[str, Any] = dict(weight_decay=0.1, max_steps=1)
    with pytest.raises(
        UnsupportedError, match=r"weight_decay: 0\.1 of .* and 0 of .*Use parameters='linear', or weig"
    ):
        fine_tune(tmp_path, base(), config(parameters="trainable"), **how)
    quick: dict[str, Any] = dict(gradient_predictor=False, segments=1, directions=2)
    assert fine_tune(tmp_path, base(), config(parameters="linear", **quick), **how).bank is not None
    model = base()
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if ("c_attn" in n) == chosen], "weight_decay": 0.1 * chosen}
        for chosen in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(UnsupportedError, match="Use weight_decay=0, or one value for all"):
        fine_tune(tmp_path, model, config(parameters="trainable"), optimizers=(optimizer, None), max_steps=1)
