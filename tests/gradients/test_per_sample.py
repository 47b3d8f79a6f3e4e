"""Per-sample gradients: each row's is that of the row alone, or the model is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hf_fwdattr.errors import NumericalError, UnsupportedError
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.models.likelihood import (
    CAUSAL_LM,
    IGNORED,
    SEQUENCE_CLASSIFICATION,
    Batch,
    Objective,
    resolve_objective,
)
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import (
    ARCHITECTURES,
    DIGITS,
    VOCABULARY,
    Classifier,
    adapted,
    finished,
    gpt2,
    llama,
    padded,
    qwen2_vl,
    token_rows,
)
from tests.helpers.reference import agree, exact_fisher, row_gradient


def models(name: str, dtype: torch.dtype = torch.float64) -> dict[str, tuple[PreTrainedModel, str]]:
    """Models of an architecture, and the parameters tracked in them."""
    make = ARCHITECTURES[name]
    return {
        "lora_B": (adapted(make(dtype)), "lora_B"),
        "lora": (adapted(make(dtype)), "lora"),
        "linear": (make(dtype), "linear"),
        # Embeddings, norms and biases too; in GPT-2 and Qwen2 the embedding is also the head.
        "everything": (make(dtype), "trainable"),
    }


def rows_alone(model: nn.Module, parameters: TrackedParameters, objective: Objective, batch: Batch) -> Tensor:
    """Gradients (rows, P) of every row of a batch by itself."""
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    return torch.stack([row_gradient(model, parameters, objective, single) for single in singles])


@pytest.mark.parametrize("choice", ["lora_B", "lora", "linear", "everything"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_gradients_equal_those_of_rows_alone(name: str, choice: str) -> None:
    model, spec = models(name)[choice]
    parameters, rows = TrackedParameters.of(model, spec), token_rows()
    with frozen(model):
        gradients, tokens = PerSampleGradients(model, parameters, CAUSAL_LM)(padded(rows))
    alone = torch.stack([row_gradient(model, parameters, CAUSAL_LM, padded([row])) for row in rows])
    agree(gradients, alone, DIGITS[name])
    assert tokens.tolist() == [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]


def test_layers_that_rows_share_a_call_of_are_differentiated_row_by_row() -> None:
    """The encoder of p-tuning makes one prompt for the whole batch."""
    settings = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = get_peft_model(llama(), settings).double().eval(), padded(token_rows())
    parameters = TrackedParameters.of(model, "trainable")
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, CAUSAL_LM)(batch)
    agree(gradients, rows_alone(model, parameters, CAUSAL_LM, batch), DIGITS["llama"])


def test_lora_on_fused_experts_has_row_gradients() -> None:
    """PEFT adds such a product to the weight of all experts, and never calls the LoRA matrices."""
    torch.manual_seed(0)
    sizes = dict(llama().config.to_dict(), num_local_experts=3, num_experts_per_tok=2)
    model = finished(MixtralForCausalLM(MixtralConfig(**sizes)), torch.float32)
    names = [name for name, weight in model.named_parameters() if weight.ndim == 3]
    adapter = adapted(model, target_modules=[], target_parameters=names)
    parameters, batch = TrackedParameters.of(adapter, "lora"), padded(token_rows(3))
    with frozen(adapter):
        gradients, _ = PerSampleGradients(adapter, parameters, CAUSAL_LM)(batch)
    agree(gradients, rows_alone(adapter, parameters, CAUSAL_LM, batch), 1e-4)


def test_patches_of_all_images_in_one_tensor_need_rows_one_by_one() -> None:
    model = adapted(qwen2_vl(), target_modules=["q_proj", "qkv"])
    tokens = torch.tensor([[20, 21, 22, 3, 4, 5], [20, 21, 22, 6, 7, 8]])
    batch = {
        "input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == 21).int(), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
        "pixel_values": torch.linspace(-1, 1, 96).view(8, 12),
    }  # fmt: skip
    single = {key: value[:1] for key, value in batch.items()} | {"pixel_values": batch["pixel_values"][:4]}
    parameters = TrackedParameters.of(model, "lora")
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, CAUSAL_LM)(single)
        with pytest.raises(UnsupportedError, match=r"pixel_values: shape \(8, 12\) in a batch of 2.*batch_size=1"):
            PerSampleGradients(model, parameters, CAUSAL_LM)(batch)
    agree(gradients[0], row_gradient(model, parameters, CAUSAL_LM, single), 1e-4)
    assert resolve_objective(model) is CAUSAL_LM


@pytest.mark.parametrize("choice", ["lora", "everything"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_order_batch_size_and_padding_change_nothing(name: str, choice: str) -> None:
    model, spec = models(name)[choice]
    parameters, rows = TrackedParameters.of(model, spec), token_rows()
    with frozen(model):
        gradients = PerSampleGradients(model, parameters, CAUSAL_LM)
        whole, _ = gradients(padded(rows))
        shuffled, _ = gradients(padded([rows[i] for i in (3, 1, 4, 0, 2)], 15))
        chunks = torch.cat([gradients(padded(part))[0] for part in (rows[:1], rows[1:3], rows[3:])])
    agree(shuffled, whole[[3, 1, 4, 0, 2]], DIGITS[name])
    agree(chunks, whole, DIGITS[name])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_have_the_digits_of_their_precision(name: str) -> None:
    def gradients(dtype: torch.dtype) -> Tensor:
        model = models(name, dtype)["lora"][0]
        with frozen(model):
            return PerSampleGradients(model, TrackedParameters.of(model, "lora"), CAUSAL_LM)(padded(token_rows()))[0]

    exact = gradients(torch.float64)
    agree(gradients(torch.float32), exact, 1e-5)
    half = gradients(torch.bfloat16)
    assert half.dtype == torch.float32
    agree(half, exact, 0.1)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.5}])
def test_adapter_variants_have_row_gradients(changes: dict[str, Any]) -> None:
    model = adapted(llama(), **changes)
    parameters, rows = TrackedParameters.of(model, "trainable"), token_rows()
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, CAUSAL_LM)(padded(rows))
    alone = torch.stack([row_gradient(model, parameters, CAUSAL_LM, padded([row])) for row in rows])
    agree(gradients, alone, DIGITS["llama"])


def test_sequence_classifier_has_row_gradients() -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=1, n_head=2, num_labels=3, pad_token_id=0
    )
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config).double()
    parameters, batch = TrackedParameters.of(model, "trainable"), padded(token_rows())
    batch |= {"labels": torch.tensor([0, 2, 1, 1, 0])}
    with frozen(model):
        gradients, tokens = PerSampleGradients(model, parameters, SEQUENCE_CLASSIFICATION)(batch)
        agree(gradients, rows_alone(model, parameters, SEQUENCE_CLASSIFICATION, batch), 1e-9)
    assert tokens.tolist() == [1] * 5


def test_row_without_supervised_tokens_has_gradient_zero() -> None:
    model, rows = adapted(gpt2()), token_rows()
    rows[2]["labels"] = [IGNORED] * len(rows[2]["labels"])
    with frozen(model):
        gradients, tokens = PerSampleGradients(model, TrackedParameters.of(model, "lora"), CAUSAL_LM)(padded(rows))
    assert not gradients[2].any()
    assert tokens[2] == 0
    assert gradients.norm(dim=1).count_nonzero() == 4


class Toy(nn.Module):
    """Embedding, then `body`, then a head; logits (rows, positions, classes)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(VOCABULARY, 6), body, nn.Linear(6, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


TOY = Objective("custom", lambda model, batch: (model(batch["input_ids"]), batch["labels"]))


def toy(body: nn.Module, spec: str = "linear") -> tuple[nn.Module, TrackedParameters, Batch]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (4, 3), generator=generator)
    model = Toy(body).double().eval()
    return model, TrackedParameters.of(model, spec), {"input_ids": tokens, "labels": tokens.flip(1)}


class Flat(nn.Module):
    """A Linear that gets rows and positions in one dimension, either of them first."""

    def __init__(self, positions_first: bool):
        super().__init__()
        self.inner, self.positions_first = nn.Linear(6, 6), positions_first

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1) if self.positions_first else x
        y = self.inner(turned.reshape(-1, 6)).view_as(turned)
        return y.transpose(0, 1) if self.positions_first else y


class Twice(nn.Module):
    """The same Linear applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Centred(nn.Module):
    """Centring over the batch, as in batch norm: a row depends on the other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return (y - y.mean(0)).tanh()


class AlwaysDropout(nn.Module):
    """Dropout that is active in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x), training=True)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "changed in place": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 6), nn.ELU(inplace=True)),
    "rows and positions in one dimension": lambda: Flat(positions_first=False),
    "used twice": Twice,
    "tied weights": lambda: _tied(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))),
    "never used": lambda: _with_unused(nn.Linear(6, 6)),
}  # fmt: skip


def _tied(body: nn.Sequential) -> nn.Module:
    body[2].weight = body[0].weight
    return body


def _with_unused(body: nn.Module) -> nn.Module:
    body.extra = nn.Linear(2, 2)
    return body


@pytest.mark.parametrize("spec", ["linear", "trainable"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_unusual_calls_of_a_linear_have_row_gradients(body: Callable[[], nn.Module], spec: str) -> None:
    model, parameters, batch = toy(body(), spec)
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, TOY)(batch)
        agree(gradients, rows_alone(model, parameters, TOY, batch), 1e-10)


def test_dropout_in_training_mode_is_refused() -> None:
    model = gpt2()
    model.get_submodule("transformer.drop").train()
    with pytest.raises(UnsupportedError, match=r"call model\.eval"):
        PerSampleGradients(model, TrackedParameters.of(model), CAUSAL_LM)


@pytest.mark.parametrize("body", [Centred, AlwaysDropout, lambda: Flat(positions_first=True)])
def test_models_whose_rows_influence_each_other_are_refused(body: Callable[[], nn.Module]) -> None:
    model, parameters, batch = toy(body())
    with frozen(model), pytest.raises(UnsupportedError, match="rows influence each other"):
        PerSampleGradients(model, parameters, TOY)(batch)


def test_flattened_rows_are_checked_in_every_batch() -> None:
    """A batch of one row has only one order; the second batch shows the wrong one."""
    model, parameters, batch = toy(Flat(positions_first=True))
    with frozen(model):
        gradients = PerSampleGradients(model, parameters, TOY)
        gradients({key: value[:1] for key, value in batch.items()})
        with pytest.raises(UnsupportedError, match="rows influence each other"):
            gradients(batch)


def test_activation_without_rows_is_differentiated_row_by_row() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.positions(torch.eye(3, dtype=x.dtype))

    model, parameters, batch = toy(Shared())
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, TOY)(batch)
    agree(gradients, rows_alone(model, parameters, TOY, batch), 1e-6)


def test_models_without_vmap_support_are_differentiated_row_by_row() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() if x.sum().item() > 0 else -x

    model, parameters, batch = toy(Branching(), "embedding")
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, TOY)(batch)
        agree(gradients, rows_alone(model, parameters, TOY, batch), 1e-10)


def test_non_finite_loss_names_its_rows() -> None:
    model, parameters, batch = toy(nn.Identity())
    with torch.no_grad():
        model.get_parameter("embedding.weight")[batch["input_ids"][2, 0]] = torch.nan
    bad = [row for row in range(4) if batch["input_ids"][2, 0] in batch["input_ids"][row]]
    with (
        frozen(model),
        pytest.raises(NumericalError, match=rf"row\(s\) {bad}".replace("[", r"\[").replace("]", r"\]")),
    ):
        PerSampleGradients(model, parameters, TOY)(batch)


def test_frozen_restores_modes_and_flags_after_an_error() -> None:
    model = adapted(gpt2()).train()
    model.get_submodule("base_model.model.transformer.h.0").eval()

    def state() -> tuple[list[bool], list[bool]]:
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def interrupted() -> None:
        with frozen(model):
            assert not any(state()[0])
            assert not any(state()[1])
            raise KeyboardInterrupt

    before = state()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state() == before


def test_model_is_left_unchanged() -> None:
    model = adapted(gpt2())
    before = TrackedParameters.of(model, ".").fingerprint(model)
    with frozen(model):
        PerSampleGradients(model, TrackedParameters.of(model, "lora"), CAUSAL_LM)(padded(token_rows()))
    assert TrackedParameters.of(model, ".").fingerprint(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("choice", ["lora", "everything"])
def test_sampled_gradients_depend_on_row_and_uniforms_alone(choice: str) -> None:
    model, spec = models("gpt2")[choice]
    parameters, rows = TrackedParameters.of(model, spec), token_rows()
    uniforms = torch.rand(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with frozen(model):
        gradients = PerSampleGradients(model, parameters, CAUSAL_LM)
        sampled, tokens = gradients(padded(rows), uniforms)
        observed, _ = gradients(padded(rows))
        for i, row in enumerate(rows):
            agree(gradients(padded([row], 14), uniforms[i : i + 1])[0][0], sampled[i], 1e-9)
    assert (sampled - observed).norm() > 0.1 * observed.norm()
    assert tokens.tolist() == [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]


@pytest.mark.parametrize("positions", [1, 3])
def test_sampled_gradients_converge_to_the_fisher_matrix(positions: int) -> None:
    """E[z z^T] = H with z the gradient of a row's sampled labels over the root of all supervised positions."""
    world = Classifier(rows=6, positions=positions)
    parameters = TrackedParameters.of(world.model, "trainable")
    exact = exact_fisher(world.model, parameters, world.objective, world.batch)
    repeats, generator = 20_000, torch.Generator().manual_seed(0)
    batch = {key: value.repeat(repeats, *[1] * (value.ndim - 1)) for key, value in world.batch.items()}
    uniforms = torch.rand(6 * repeats, positions, generator=generator, dtype=torch.float64)
    with frozen(world.model):
        gradients, tokens = PerSampleGradients(world.model, parameters, world.objective)(batch, uniforms)
    factor = gradients / tokens.sum().double().sqrt()
    agree(factor.T @ factor, exact, 0.02)
    # With the data's own labels instead ("empirical Fisher") it is another matrix.
    with frozen(world.model):
        observed, _ = PerSampleGradients(world.model, parameters, world.objective)(world.batch)
    empirical = observed.T @ observed / world.tokens
    assert (empirical - exact).norm() > 0.2 * exact.norm()


def test_tolerance_follows_the_dtype_of_the_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast weights are float32, but products are rounded to bfloat16."""
    model, batch = adapted(llama(torch.float32)), padded(token_rows())
    parameters = TrackedParameters.of(model, "lora")
    monkeypatch.setattr("hf_fwdattr.gradients.per_sample._TOLERANCE", {torch.float32: -1.0, torch.bfloat16: 0.2})
    with torch.autocast("cpu", torch.bfloat16):
        PerSampleGradients(model, parameters, CAUSAL_LM)(batch)
    with pytest.raises(UnsupportedError, match="rows influence each other"):
        PerSampleGradients(model, parameters, CAUSAL_LM)(batch)


def test_rounding_that_depends_on_the_batch_shape_is_tolerated_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There a row is compared with its own copies, in a batch of the same size; rows that mix are still noticed."""
    batch = padded(token_rows())
    for mixes in (False, True):
        model = adapted(llama(torch.float32))
        parameters = TrackedParameters.of(model, "lora")
        base = next(module for name, module in model.named_modules() if name.endswith("v_proj.base_layer"))

        def changed(_: nn.Module, __: Any, output: Tensor, mixes: bool = mixes) -> Tensor:
            return output + output.mean(0, keepdim=True) if mixes else output * (1 + len(output))

        base.register_forward_hook(changed)
        with torch.autocast("cpu", torch.bfloat16):
            if mixes:
                with pytest.raises(UnsupportedError, match="rows influence each other"):
                    PerSampleGradients(model, parameters, CAUSAL_LM)(batch)
            else:
                PerSampleGradients(model, parameters, CAUSAL_LM)(batch)
        with pytest.raises(UnsupportedError, match="rows influence each other"):
            PerSampleGradients(model, parameters, CAUSAL_LM)(batch)
