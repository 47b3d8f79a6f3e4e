"""Both readouts against derivatives by reverse mode, token by token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2ForSequenceClassification

from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.jvp import finite_difference as difference
from hf_fwdattr.jvp import torch_func as jvp
from hf_fwdattr.jvp.analytic import AnalyticJVP
from hf_fwdattr.jvp.backend import READOUTS
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
from hf_fwdattr.models.parameters import Parameters
from tests.helpers.cases import ARCHITECTURES, CONTEXT, VOCABULARY, adapted, gpt2, llama, padded, token_rows
from tests.helpers.reference import agree


K = 7
Read = Callable[..., Tensor]


def random_directions(parameters: Parameters, count: int = K, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, parameters.size, generator=generator, dtype=torch.float64).to(dtype)


def by_reverse_mode(
    model: nn.Module, parameters: Parameters, batch: Batch, directions: Tensor, objective: Objective = CAUSAL_LM
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
def test_float32_readouts_have_four_digits(name: str, readout: str, spec: str) -> None:
    model = adapted(ARCHITECTURES[name](torch.float32))
    parameters, batch = Parameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters)
    found = READOUTS[readout](model, parameters, CAUSAL_LM, batch, directions)
    assert found.dtype == torch.float32
    assert found.shape == (5, batch["labels"].shape[1] - 1, K)
    assert bool((found[batch["labels"][:, 1:] == IGNORED] == 0).all())
    expected = by_reverse_mode(model, parameters, batch, directions)
    agree(found, expected, 1e-4)
    found, expected = found.double(), expected.detach()
    norms = expected.norm(dim=-1)
    supervised = norms > 0.05 * norms.max()
    worst = (found - expected).norm(dim=-1)[supervised] / norms[supervised]
    assert float(worst.max()) < (1e-4 if readout == "jvp" else 2e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_jvp_is_exact(name: str) -> None:
    model = adapted(ARCHITECTURES[name]())
    parameters, batch = Parameters.of(model, "lora"), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    found = jvp.read(model, parameters, CAUSAL_LM, batch, directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 1e-10 if name == "gpt2" else 2e-5)


@pytest.mark.parametrize("read", [jvp.read, difference.read, partial(difference.read, sides=1)])
def test_one_or_two_sides_of_a_difference_and_the_derivative_agree(read: Read) -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters, dtype=torch.float64)
    found = read(model, parameters, CAUSAL_LM, batch, directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 1e-6)


def written(*things: Any, chunk: int | None = None) -> Tensor:
    *rest, directions = things
    return AnalyticJVP(*rest).along(directions, chunk)


@pytest.mark.parametrize("read", [jvp.read, written])
@pytest.mark.parametrize("chunk", [1, 3, 100, None])
def test_chunks_of_probes_change_nothing(chunk: int | None, read: Read) -> None:
    model = adapted(llama(torch.float32))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    whole = read(model, parameters, CAUSAL_LM, batch, directions, chunk=K)
    agree(read(model, parameters, CAUSAL_LM, batch, directions, chunk=chunk), whole, 1e-6)


@pytest.mark.parametrize("readout", ["jvp", "difference"])
def test_queries_do_not_see_each_other_nor_their_padding(readout: str) -> None:
    model, rows = adapted(gpt2()), token_rows()
    parameters = Parameters.of(model)
    directions = random_directions(parameters, dtype=torch.float64)
    raise_on_all_ranks = READOUTS[readout](model, parameters, CAUSAL_LM, padded(rows, CONTEXT), directions)
    for index, row in enumerate(rows):
        alone = READOUTS[readout](model, parameters, CAUSAL_LM, padded([row]), directions)
        length = alone.shape[1]
        agree(raise_on_all_ranks[index, :length], alone[0], 1e-8 if readout == "jvp" else 1e-6)
        assert bool((raise_on_all_ranks[index, length:] == 0).all())


def shortcut_taken(model: nn.Module, parameters: Parameters, batch: Batch) -> bool:
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
    ids=["GPT-2", "Llama", "head responds", "tied head responds", "LoRA on the head", "head saved", "softcap"],
)
def test_the_vocabulary_is_visited_where_it_must_be_and_only_there(
    make: Callable[[torch.dtype], nn.Module], spec: str, short: bool
) -> None:
    model, batch = make(torch.float32), padded(token_rows())
    parameters = Parameters.of(model, spec)
    assert shortcut_taken(model, parameters, batch) == short
    directions = random_directions(parameters)
    found = jvp.read(model, parameters, CAUSAL_LM, batch, directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 1e-4)


def test_a_weak_softcap_is_not_overlooked() -> None:
    """Logits that a cap of 30 changes in the fourth digit only."""
    model, batch = softcapped(torch.float32), padded(token_rows())
    model.config.final_logit_softcapping = 30.0  # type: ignore[union-attr]
    assert not shortcut_taken(model, Parameters.of(model), batch)


def test_a_classifier_is_read_at_its_one_position() -> None:
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, pad_token_id=0, num_labels=3
    )
    model = GPT2ForSequenceClassification(settings).eval()
    parameters = Parameters.of(model, "trainable")
    batch = padded(token_rows()) | {"labels": torch.tensor([0, 1, 2, 1, 0])}
    directions = random_directions(parameters)
    found = jvp.read(model, parameters, SEQUENCE_CLASSIFICATION, batch, directions)
    assert found.shape == (5, 1, K)
    agree(found, by_reverse_mode(model, parameters, batch, directions, SEQUENCE_CLASSIFICATION), 1e-4)


def test_a_readout_is_linear_in_its_probes() -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    one, other = random_directions(parameters, 2, torch.float64)
    three = torch.stack([one, other, 2 * one - 3 * other])
    found = jvp.read(model, parameters, CAUSAL_LM, batch, three)
    agree(found[..., 2], 2 * found[..., 0] - 3 * found[..., 1], 1e-10)


def test_the_score_is_the_first_order_of_a_real_step() -> None:
    """Along a direction, log-likelihood really changes as the readout says, and its sign turns with the step."""
    model, batch = adapted(gpt2()), padded(token_rows())
    parameters = Parameters.of(model)
    theta, (direction,) = parameters.read(model), random_directions(parameters, 1, torch.float64)
    slope = jvp.read(model, parameters, CAUSAL_LM, batch, direction[None])[..., 0]
    values = []
    for side in (1e-5, -1e-5):
        parameters.write(model, theta + side * direction)
        with torch.no_grad():
            values.append(log_probabilities(*CAUSAL_LM.forward(model, batch)))
    agree((values[0] - values[1]) / 2e-5, slope, 1e-7)


def test_bfloat16_has_no_digits_for_differences() -> None:
    model = adapted(llama(torch.bfloat16))
    parameters, batch = Parameters.of(model), padded(token_rows())
    with pytest.raises(
        NumericalError, match=r"bfloat16 disagree by .*load the model in float32, or use readout='jvp'"
    ):
        difference.read(model, parameters, CAUSAL_LM, batch, random_directions(parameters))


def test_bfloat16_has_digits_for_derivatives() -> None:
    model = adapted(llama(torch.bfloat16))
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = random_directions(parameters)
    found = jvp.read(model, parameters, CAUSAL_LM, batch, directions)
    assert found.dtype == torch.float32
    agree(found, by_reverse_mode(model, parameters, batch, directions), 0.03)


def test_a_probe_of_zeros_reads_zero() -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    directions = torch.cat([torch.zeros(1, parameters.size), random_directions(parameters, 2)])
    for read in READOUTS.values():
        found = read(model, parameters, CAUSAL_LM, batch, directions)
        assert bool((found[..., 0] == 0).all())
        assert bool((found[..., 1:] != 0).any())


@pytest.mark.parametrize("readout", ["jvp", "difference"])
def test_training_mode_is_refused(readout: str) -> None:
    model = adapted(gpt2()).train()
    parameters, batch = Parameters.of(model), padded(token_rows())
    with pytest.raises(UnsupportedError, match=r"call model.eval\(\)"):
        READOUTS[readout](model, parameters, CAUSAL_LM, batch, random_directions(parameters))


def test_inference_mode_is_refused_where_it_would_drop_derivatives() -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=r"use torch\.no_grad instead"):
        jvp.read(model, parameters, CAUSAL_LM, batch, random_directions(parameters))


def test_quantised_layers_whose_tangents_vanish_are_refused() -> None:
    """Seen with bitsandbytes 0.50 on a CPU: derivatives were off by 84 % of their size, without a word."""
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.add_module("q_proj", kind(2, 2).eval())
    with pytest.raises(UnsupportedError, match=r"q_proj is a Linear4bit of bitsandbytes, .* use readout='difference'"):
        jvp.read(model, parameters, CAUSAL_LM, batch, random_directions(parameters))
    assert bool(READOUTS["difference"](model, parameters, CAUSAL_LM, batch, random_directions(parameters)).ne(0).any())


class Doubled(torch.autograd.Function):
    """As fused kernels are written: it knows its backward only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        return 2 * incoming


def flash(x: Tensor) -> Tensor:
    """A kernel of torch's own without a forward-mode derivative."""
    heads = x[:, None].repeat(1, 1, 1, 2)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)[0][:, 0, :, : x.shape[-1]]


@pytest.mark.parametrize(
    ("kernel", "named"), [(Doubled.apply, "autograd.Function"), (flash, "_flash_attention_for_cpu")]
)
def test_an_operation_without_forward_derivative_is_named(kernel: Callable[[Tensor], Tensor], named: str) -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    own = Objective("custom", lambda m, b: (kernel(CAUSAL_LM.forward(m, b)[0]), b["labels"][:, 1:]))
    with pytest.raises(UnsupportedError, match=rf"{named}.*readout='difference'"):
        jvp.read(model, parameters, own, batch, random_directions(parameters))
    differences = difference.read(model, parameters, own, batch, random_directions(parameters, dtype=torch.float64))
    assert bool(torch.isfinite(differences).all())
    assert bool((differences != 0).any())


def test_nan_is_not_reported_as_a_score() -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    with torch.no_grad():
        parameters.tensors(model)[0].fill_(float("nan"))
    with pytest.raises(NumericalError, match="is not finite"):
        jvp.read(model, parameters, CAUSAL_LM, batch, random_directions(parameters))
    with pytest.raises(NumericalError, match="disagree by nan"):
        difference.read(model, parameters, CAUSAL_LM, batch, random_directions(parameters))


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(gpt2())
    parameters, batch = Parameters.of(model), padded(token_rows())
    theta = parameters.read(model)
    for read in READOUTS.values():
        read(model, parameters, CAUSAL_LM, batch, random_directions(parameters))
    assert torch.equal(parameters.read(model), theta)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
