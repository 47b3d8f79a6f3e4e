"""Capture: each row's gradient from the backward pass that trains is that of its own loss, and changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.capture import CapturedBatch, GradientCapture, unhooked_weights
from hf_fwdattr.models.likelihood import CAUSAL_LM, Batch, row_losses
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import ARCHITECTURES, adapted, gpt2, llama, padded, token_rows
from tests.helpers.reference import agree, row_gradient


def total_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A loss with factors of its own: 0.25 times the summed negative log-likelihood."""
    return 0.25 * row_losses(*CAUSAL_LM.forward(model, batch)).sum()


def captured(model: nn.Module, spec: str, batches: list[Batch]) -> tuple[GradientCapture, list[CapturedBatch]]:
    """Train for one step on the batches, one after the other, in training mode."""
    capture = GradientCapture(model, TrackedParameters.of(model, spec))
    found = []
    for batch in batches:
        found.append(capture.begin(len(batch["labels"]), compared=True))
        loss = total_loss(model.train(), batch)
        capture.end()
        loss.backward()
    for handle in capture.handles:
        handle.remove()
    model.eval()
    return capture, found


def alone(model: nn.Module, spec: str, rows: list[Any]) -> Tensor:
    """(rows, P) by plain autograd, row after row."""
    parameters = TrackedParameters.of(model, spec)
    return torch.stack([0.25 * row_gradient(model, parameters, CAUSAL_LM, padded([row])) for row in rows])


def trainable(model: Any) -> Any:
    """The model with every weight trained, and no dropout."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("spec", ["lora_B", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_have_the_gradients_of_their_own_losses(name: str, spec: str) -> None:
    model, rows = trainable(adapted(ARCHITECTURES[name]())), token_rows(5)
    _, (first, second) = captured(model, spec, [padded(rows[:3]), padded(rows[3:])])
    assert first.gradients is not None
    assert second.gradients is not None
    agree(torch.cat([first.gradients, second.gradients]), alone(model, spec, rows), 1e-5)


def test_weights_and_biases_of_plain_layers() -> None:
    model, rows = trainable(gpt2()), token_rows(4)
    spec = r"(c_attn|c_proj|c_fc)\.(weight|bias)$"
    _, (batch,) = captured(model, spec, [padded(rows)])
    assert batch.gradients is not None
    agree(batch.gradients, alone(model, spec, rows), 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints(reentrant: bool) -> None:
    """A layer runs twice; its input is taken from the second run, so that none is kept in between."""
    model, rows = trainable(adapted(llama())), token_rows(4)
    expected = alone(model, "lora", rows)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    capture, (batch,) = captured(model, "lora", [padded(rows)])
    assert batch.gradients is not None
    assert not capture.failure
    agree(batch.gradients, expected, 2e-5)


def test_inputs_of_checkpointed_layers_are_not_kept() -> None:
    model = trainable(adapted(llama()))
    model.activation_checkpointing_enable({"use_reentrant": False})
    capture = GradientCapture(model, TrackedParameters.of(model, "lora"))
    capture.begin(4, compared=False)
    total_loss(model.train(), padded(token_rows(4)))
    calls = [call for waiting in capture._waiting.values() for call in waiting]
    assert calls
    assert all(call.x is None for call in calls)


def test_training_is_bitwise_the_same() -> None:
    batch = padded(token_rows(4))
    plain, watched = (trainable(adapted(llama(torch.float32))) for _ in range(2))
    total_loss(plain.train(), batch).backward()
    captured(watched, "lora", [batch])
    for (name, one), (_, other) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    model, rows = trainable(adapted(llama(torch.float32))), token_rows(4)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        capture, (batch,) = captured(model, "lora", [padded(rows)])
    assert batch.gradients is not None
    assert batch.gradients.dtype == torch.float32
    agree(batch.gradients, alone(model, "lora", rows), 0.05 if dtype == torch.bfloat16 else 1e-5)
    capture.refuse_other_totals([batch])


def test_passes_outside_begin_and_end_are_not_captured() -> None:
    model, rows = trainable(adapted(llama())), token_rows(2)
    capture = GradientCapture(model, TrackedParameters.of(model, "lora"))
    found = capture.begin(2, compared=False)
    loss = total_loss(model.train(), padded(rows))
    capture.end()
    other = total_loss(model, padded(rows[::-1]))  # as an evaluation in the middle of a step
    (loss + other).backward()
    assert found.gradients is not None
    agree(found.gradients, alone(model, "lora", rows), 1e-5)


def test_weights_that_are_frozen_on_the_way_get_nothing() -> None:
    model, rows = trainable(adapted(llama())), token_rows(3)
    parameters = TrackedParameters.of(model, "lora")
    capture = GradientCapture(model, parameters)
    frozen = [name for name in parameters.live if "lora_A" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found = capture.begin(3, compared=True)
    loss = total_loss(model.train(), padded(rows))
    capture.end()
    loss.backward()
    capture.refuse_other_totals([found])
    assert found.gradients is not None
    blocks = dict(zip(parameters.live, parameters.split(found.gradients), strict=True))
    assert [name for name, block in blocks.items() if not bool(block.any())] == frozen


def test_layer_that_is_called_twice() -> None:
    class Twice(Doubled):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return self.head(self.layer(self.layer(self.embedding(input_ids))))

    model: Any = Twice()
    capture = GradientCapture(model, TrackedParameters.of(model, "linear"))
    found = loss_of(model, token_rows(4), capture)
    capture.refuse_other_totals([found])
    assert found.gradients is not None
    agree(found.gradients.sum(0)[:36], model.layer.weight.grad.flatten(), 1e-5)


def test_failing_product_ends_the_capture_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    model: Any = Doubled()
    capture = GradientCapture(model, TrackedParameters.of(model, "linear"))
    monkeypatch.setattr("hf_fwdattr.gradients.capture.linear_gradient", fails)
    found = loss_of(model, token_rows(4), capture)
    assert model.head.weight.grad is not None
    assert found.gradients is None
    assert capture.failure == "out of memory"


class Doubled(nn.Module):
    """A layer whose weight is used a second time without a call, and a layer that flattens rows and positions."""

    def __init__(self, flattens: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(23, 6), nn.Linear(6, 6), nn.Linear(6, 23)
        self.flattens = flattens

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.embedding(input_ids)
        if self.flattens:
            return self.head(self.layer(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]))
        return self.head(self.layer(hidden) + hidden @ self.layer.weight)


def loss_of(model: Doubled, rows: list[Any], capture: GradientCapture) -> CapturedBatch:
    batch = padded(rows)
    found = capture.begin(len(rows), compared=True)
    logits = model.train()(**batch)
    capture.end()
    nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"]).backward()
    return found


def test_weight_used_without_its_layer_is_refused() -> None:
    model: Any = Doubled()
    capture = GradientCapture(model, TrackedParameters.of(model, "linear"))
    found = loss_of(model, token_rows(4), capture)
    with pytest.raises(UnsupportedError, match=r"layer\.weight: .* differ from their sum in training by \d"):
        capture.refuse_other_totals([found])


def test_flattened_rows_are_given_up() -> None:
    model: Any = Doubled(flattens=True)
    capture = GradientCapture(model, TrackedParameters.of(model, "linear"))
    loss_of(model, token_rows(4), capture)
    assert "layer has an activation of shape" in capture.failure
    assert not any(module._forward_hooks for module in model.modules())


def test_two_forward_passes_before_a_backward_pass() -> None:
    """Without checkpoints each fills its own; with them it is not known which runs again."""
    rows, model = token_rows(4), trainable(adapted(llama()))

    def both(model: Any) -> tuple[GradientCapture, list[CapturedBatch]]:
        capture, found, losses = GradientCapture(model, TrackedParameters.of(model, "lora")), [], []
        for part in (rows[:2], rows[2:]):
            found.append(capture.begin(2, compared=False))
            losses.append(total_loss(model.train(), padded(part)))
            capture.end()
        (losses[0] + losses[1]).backward()
        return capture, found

    expected = alone(model, "lora", rows)
    _, found = both(model)
    agree(torch.cat([one.gradients for one in found if one.gradients is not None]), expected, 1e-5)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert "ran several times" in both(model)[0].failure


def test_only_weights_of_single_layers_are_hooked() -> None:
    """An output layer that shares its weight with the embedding is named by the embedding."""
    for tied, name in ((True, "model.embed_tokens.weight"), (False, "model.norm.weight")):
        model = trainable(llama(tie_word_embeddings=tied))
        names = unhooked_weights(model, TrackedParameters.of(model, "trainable"))
        assert name in names
        assert not any("proj" in other or "lm_head" in other for other in names)
