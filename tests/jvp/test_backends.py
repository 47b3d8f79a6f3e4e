"""Backends against derivatives by reverse mode, token by token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2ForSequenceClassification

from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.jvp.analytic import AnalyticJVP
from hf_fwdattr.jvp.backend import METHODS, Backend
from hf_fwdattr.jvp.finite_difference import FiniteDifferenceJVP
from hf_fwdattr.jvp.torch_func import TorchFuncJVP
from hf_fwdattr.models.likelihood import (
    CAUSAL_LM,
    IGNORED,
    SEQUENCE_CLASSIFICATION,
    Batch,
    Likelihood,
    Objective,
    log_probabilities,
)
from hf_fwdattr.models.output_head import hidden_state_gradients, hidden_states, output_layer
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import (
    ARCHITECTURES,
    CONTEXT,
    VOCABULARY,
    Classifier,
    adapted,
    gpt2,
    llama,
    padded,
    token_rows,
)
from tests.helpers.reference import agree


K = 7
Method = Callable[..., Any]


def random_directions(parameters: TrackedParameters, count: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, parameters.size, generator=generator, dtype=torch.float64).to(dtype)


def by_reverse_mode(
    model: nn.Module, parameters: TrackedParameters, batch: Batch, directions: Tensor, objective: Objective = CAUSAL_LM
) -> Tensor:
    """(queries, positions, k): one Jacobian of the log-likelihoods in float64, times the directions."""
    model = model.double()
    likelihood = Likelihood(model, objective)
    live = {name: tensor.detach() for name, tensor in zip(parameters.live, parameters.tensors(model), strict=True)}

    def value(weights: dict[str, Tensor]) -> Tensor:
        replaced = {f"model.{name}": weight for name, weight in weights.items()}
        logits, labels = functional_call(likelihood, replaced, (batch,))
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(labels == IGNORED, 0.0)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        blocks = jacrev(value)(live)
    return torch.cat([blocks[name].flatten(2) for name in parameters.live], dim=-1) @ directions.double().T


@pytest.mark.parametrize("spec", ["lora_B", "lora"])
@pytest.mark.parametrize("readout", ["jvp", "difference"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_derivatives_have_four_digits(name: str, readout: str, spec: str) -> None:
    model = adapted(ARCHITECTURES[name](torch.float32))
    parameters, batch = TrackedParameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters)
    derivatives = METHODS[readout](model, parameters, CAUSAL_LM, batch).jvp(directions)
    assert derivatives.dtype == torch.float32
    assert derivatives.shape == (5, batch["labels"].shape[1] - 1, K)
    assert bool((derivatives[batch["labels"][:, 1:] == IGNORED] == 0).all())
    expected = by_reverse_mode(model, parameters, batch, directions)
    agree(derivatives, expected, 1e-4)
    derivatives, expected = derivatives.double(), expected.detach()
    norms = expected.norm(dim=-1)
    supervised = norms > 0.05 * norms.max()
    worst = (derivatives - expected).norm(dim=-1)[supervised] / norms[supervised]
    assert float(worst.max()) < (1e-4 if readout == "jvp" else 2e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_jvp_is_exact(name: str) -> None:
    model = adapted(ARCHITECTURES[name]())
    parameters, batch = TrackedParameters.of(model, "lora"), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    derivatives = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 1e-10 if name == "gpt2" else 2e-5)


@pytest.mark.parametrize("method", [TorchFuncJVP, FiniteDifferenceJVP, partial(FiniteDifferenceJVP, sides=1)])
def test_one_or_two_sided_differences_equal_the_derivative(method: Method) -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    derivatives = method(model, parameters, CAUSAL_LM, batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 1e-6)


@pytest.mark.parametrize("method", [TorchFuncJVP, AnalyticJVP])
@pytest.mark.parametrize("chunk", [1, 3, 100, None])
def test_chunk_size_does_not_change_derivatives(chunk: int | None, method: Method) -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    prepared = method(model, parameters, CAUSAL_LM, batch)
    agree(prepared.jvp(directions, chunk=chunk), prepared.jvp(directions, chunk=K), 1e-6)


@pytest.mark.parametrize("readout", ["jvp", "difference"])
def test_batched_queries_and_padding_do_not_interact(readout: str) -> None:
    model, rows = adapted(gpt2()), token_rows()
    parameters = TrackedParameters.of(model)
    directions = random_directions(parameters, dtype=torch.float64)
    batched = METHODS[readout](model, parameters, CAUSAL_LM, padded(rows, CONTEXT)).jvp(directions)
    for index, row in enumerate(rows):
        alone = METHODS[readout](model, parameters, CAUSAL_LM, padded([row])).jvp(directions)
        length = alone.shape[1]
        agree(batched[index, :length], alone[0], 1e-8 if readout == "jvp" else 1e-6)
        assert bool((batched[index, length:] == 0).all())


def stops_at_hidden_state(model: nn.Module, parameters: TrackedParameters, batch: Batch) -> bool:
    with torch.no_grad():
        head = output_layer(model, parameters, CAUSAL_LM)
        return (
            head is not None
            and hidden_state_gradients(head, *hidden_states(Likelihood(model, CAUSAL_LM), head, batch)) is not None
        )


def softcapped(dtype: torch.dtype) -> nn.Module:
    """Gemma 2 squashes its logits after the output layer."""
    torch.manual_seed(0)
    settings = Gemma2Config(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=12, intermediate_size=20, head_dim=6,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=2.0,
        attn_implementation="eager", query_pre_attn_scalar=6, hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    return adapted(Gemma2ForCausalLM(settings).to(dtype).eval())


@pytest.mark.parametrize(
    ("make", "spec", "short"),
    [
        (lambda dtype: adapted(gpt2(dtype)), "lora_B", True),
        (lambda dtype: adapted(llama(dtype)), "lora", True),
        (lambda dtype: llama(dtype), r"lm_head|layers\.1.*down_proj", False),
        (lambda dtype: gpt2(dtype), "trainable", False),
        (lambda dtype: adapted(llama(dtype), target_modules=["lm_head", "q_proj"]), "lora_B", False),
        (lambda dtype: adapted(llama(dtype), modules_to_save=["lm_head"]), "trainable", False),
        (softcapped, "lora_B", False),
    ],
    ids=["GPT-2", "Llama", "tracked head", "tracked tied head", "LoRA on the head", "head saved", "softcap"],
)
def test_tangents_visit_the_vocabulary_only_where_necessary(
    make: Callable[[torch.dtype], nn.Module], spec: str, short: bool
) -> None:
    model, batch = make(torch.float32), padded(token_rows())
    parameters = TrackedParameters.of(model, spec)
    assert stops_at_hidden_state(model, parameters, batch) == short
    directions = random_directions(parameters)
    derivatives = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 1e-4)


def test_weak_logit_softcap_is_detected() -> None:
    """Logits that a cap of 30 changes in the fourth digit only."""
    model, batch = softcapped(torch.float32), padded(token_rows())
    model.config.final_logit_softcapping = 30.0  # type: ignore[union-attr]
    assert not stops_at_hidden_state(model, TrackedParameters.of(model), batch)


def test_classifier_has_one_position() -> None:
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, pad_token_id=0, num_labels=3
    )
    model = GPT2ForSequenceClassification(settings).eval()
    parameters = TrackedParameters.of(model, "trainable")
    batch = padded(token_rows()) | {"labels": torch.tensor([0, 1, 2, 1, 0])}
    directions = random_directions(parameters)
    derivatives = TorchFuncJVP(model, parameters, SEQUENCE_CLASSIFICATION, batch).jvp(directions)
    assert derivatives.shape == (5, 1, K)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions, SEQUENCE_CLASSIFICATION), 1e-4)


def test_derivatives_are_linear_in_directions() -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    one, other = random_directions(parameters, 2, torch.float64)
    three = torch.stack([one, other, 2 * one - 3 * other])
    derivatives = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(three)
    agree(derivatives[..., 2], 2 * derivatives[..., 0] - 3 * derivatives[..., 1], 1e-10)


def test_derivative_is_the_first_order_change_of_a_real_step() -> None:
    model, batch = adapted(gpt2()), padded(token_rows())
    parameters = TrackedParameters.of(model)
    theta, (direction,) = parameters.read(model), random_directions(parameters, 1, torch.float64)
    slope = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(direction[None])[..., 0]
    values = []
    for side in (1e-5, -1e-5):
        parameters.write(model, theta + side * direction)
        with torch.no_grad():
            values.append(log_probabilities(*CAUSAL_LM.forward(model, batch)))
    agree((values[0] - values[1]) / 2e-5, slope, 1e-7)


def test_differences_in_bfloat16_are_refused() -> None:
    model = adapted(llama(torch.bfloat16))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    with pytest.raises(
        NumericalError, match=r"bfloat16 disagree by .*load the model in float32, or use readout='jvp'"
    ):
        FiniteDifferenceJVP(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))


def test_torch_func_works_in_bfloat16() -> None:
    model = adapted(llama(torch.bfloat16))
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    derivatives = TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions)
    assert derivatives.dtype == torch.float32
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 0.03)


def test_zero_direction_has_zero_derivatives() -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    directions = torch.cat([torch.zeros(1, parameters.size), random_directions(parameters, 2)])
    for method in METHODS.values():
        derivatives = method(model, parameters, CAUSAL_LM, batch).jvp(directions)
        assert bool((derivatives[..., 0] == 0).all())
        assert bool((derivatives[..., 1:] != 0).any())


@pytest.mark.parametrize("readout", ["jvp", "difference"])
def test_training_mode_is_refused(readout: str) -> None:
    model = adapted(gpt2()).train()
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    with pytest.raises(UnsupportedError, match=r"call model.eval\(\)"):
        METHODS[readout](model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))


def test_inference_mode_is_refused_by_torch_func() -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=r"use torch\.no_grad instead"):
        TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))


def test_quantized_layers_are_refused_by_torch_func() -> None:
    """With bitsandbytes 0.50 on a CPU derivatives are silently off by 84 % of their size."""
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.add_module("q_proj", kind(2, 2).eval())
    with pytest.raises(UnsupportedError, match=r"q_proj is a Linear4bit of .* Use readout='difference'"):
        TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))
    differences = FiniteDifferenceJVP(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))
    assert bool(differences.ne(0).any())


class Doubled(torch.autograd.Function):
    """An operation with a backward only, as fused kernels are written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        return 2 * incoming


def flash(x: Tensor) -> Tensor:
    """A kernel of torch without a forward-mode derivative."""
    heads = x[:, None].repeat(1, 1, 1, 2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)[0][:, 0, :, : x.shape[-1]]


@pytest.mark.parametrize(
    ("kernel", "named"), [(Doubled.apply, "autograd.Function"), (flash, "_flash_attention_for_cpu")]
)
def test_operation_without_forward_derivative_is_named(kernel: Callable[[Tensor], Tensor], named: str) -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    objective = Objective("custom", lambda m, b: (kernel(CAUSAL_LM.forward(m, b)[0]), b["labels"][:, 1:]))
    with pytest.raises(UnsupportedError, match=rf"{named}.*readout='difference'"):
        TorchFuncJVP(model, parameters, objective, batch).jvp(random_directions(parameters))
    differences = FiniteDifferenceJVP(model, parameters, objective, batch).jvp(
        random_directions(parameters, dtype=torch.float64)
    )
    assert bool(torch.isfinite(differences).all())
    assert bool((differences != 0).any())
    backend = Backend(model, parameters)  # chooses differences itself, and remembers
    chosen = backend.prepare(batch, objective=objective).jvp(random_directions(parameters, dtype=torch.float64))
    assert torch.equal(chosen, differences)
    assert isinstance(backend.prepare(batch, objective=objective), FiniteDifferenceJVP)


def test_differences_keep_clear_of_a_jump() -> None:
    """As where a token changes its expert: one direction needs a shorter step than the others."""
    world = Classifier(rows=5)
    parameters, start = TrackedParameters.of(world.model, "trainable"), float(world.model.weight[0, 2].detach())

    def jumping(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = world.objective.forward(model, batch)
        jump = (model.weight[0, 2] > start + 2e-3).to(logits.dtype)  # type: ignore[index]
        return logits + jump * torch.tensor([3.0, 0.0, 0.0], dtype=logits.dtype), labels

    directions = torch.eye(parameters.size, dtype=torch.float64)
    plain, jumps = (
        FiniteDifferenceJVP(world.model, parameters, objective, world.batch, step=1e-2).jvp(directions)
        for objective in (world.objective, Objective("custom", jumping))
    )
    agree(jumps, plain, 1e-6)


def test_nan_weights_are_refused() -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    with torch.no_grad():
        parameters.tensors(model)[0].fill_(float("nan"))
    with pytest.raises(NumericalError, match="is not finite"):
        TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))
    with pytest.raises(NumericalError, match="disagree by nan"):
        FiniteDifferenceJVP(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))


def test_model_is_left_unchanged() -> None:
    model = adapted(gpt2())
    parameters, batch = TrackedParameters.of(model), padded(token_rows())
    theta = parameters.read(model)
    for method in METHODS.values():
        method(model, parameters, CAUSAL_LM, batch).jvp(random_directions(parameters))
    assert torch.equal(parameters.read(model), theta)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
