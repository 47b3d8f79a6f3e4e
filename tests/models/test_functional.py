"""Calls with other weights: tied copies are replaced too, the model is left as it was, checkpointing's hooks rest."""

import pytest
import torch
from peft import PeftModel
from torch.func import grad

from hf_fwdattr.models.functional import call_with_weights
from hf_fwdattr.models.likelihood import CAUSAL_LM, Likelihood, row_losses
from tests.helpers.cases import adapted, gpt2, padded, token_rows


def with_trained_tokens() -> tuple[PeftModel, str]:
    """A model whose embedding and output layer share one adapter of three tokens, and that adapter's live name."""
    model = adapted(gpt2(), trainable_token_indices=[1, 2, 5])
    (name,) = [name for name, _ in model.named_parameters() if "trainable_tokens_delta" in name]
    return model, name


def test_weight_of_a_module_that_is_registered_twice_is_put_back() -> None:
    model, name = with_trained_tokens()
    before, batch = model.get_parameter(name), padded(token_rows(2))
    likelihood = Likelihood(model, CAUSAL_LM)
    plain = row_losses(*CAUSAL_LM.forward(model, batch))
    changed = row_losses(*likelihood.at({name: before.detach() * 2}, batch))
    assert model.get_parameter(name) is before
    assert torch.equal(row_losses(*CAUSAL_LM.forward(model, batch)), plain)
    with torch.no_grad():
        before *= 2
    assert torch.equal(row_losses(*CAUSAL_LM.forward(model, batch)), changed)


def test_tied_weight_is_replaced_in_both_places() -> None:
    model, batch = gpt2(), padded(token_rows(2))
    weight = model.get_parameter("transformer.wte.weight")
    with torch.no_grad():
        changed = CAUSAL_LM.forward(model, batch)[0]
        called = call_with_weights(Likelihood(model, CAUSAL_LM), {"model.transformer.wte.weight": weight * 2}, batch)
        weight *= 2
    assert torch.equal(called[0], CAUSAL_LM.forward(model, batch)[0])
    assert not torch.equal(called[0], changed)


@pytest.mark.parametrize("hooked_before", [True, False])
def test_hooks_of_gradient_checkpointing_rest_and_return_in_order(hooked_before: bool) -> None:
    model, batch = adapted(gpt2()), padded(token_rows(2))
    embedding = model.get_base_model().get_input_embeddings()
    calls: list[bool] = []

    def note(module: object, inputs: object, output: torch.Tensor) -> None:
        calls.append(output.requires_grad)

    if hooked_before:
        embedding.register_forward_hook(note)
    model.get_base_model().enable_input_require_grads()
    if not hooked_before:
        embedding.register_forward_hook(note)
    order, name = list(embedding._forward_hooks), next(n for n, _ in model.named_parameters() if "lora_B" in n)
    likelihood = Likelihood(model.requires_grad_(False), CAUSAL_LM)
    grad(lambda weight: row_losses(*likelihood.at({name: weight}, batch)).sum())(model.get_parameter(name).detach())
    assert calls == [False]
    assert list(embedding._forward_hooks) == order
    CAUSAL_LM.forward(model, batch)
    assert calls[1:] == [not hooked_before]
