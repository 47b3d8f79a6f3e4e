"""Features of one forward pass: the same alone, in a batch and padded, for every kind of model; what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.forward_features import ForwardFeatures
from hf_fwdattr.models.likelihood import CAUSAL_LM, IGNORED, SEQUENCE_CLASSIFICATION, Objective
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import VOCABULARY, adapted, gpt2, llama, padded, token_rows
from tests.helpers.reference import agree


IMAGES = Objective(
    "custom", lambda model, batch: (model(batch["pixel_values"]).unsqueeze(1), batch["labels"].unsqueeze(1))
)
SEQ2SEQ = Objective("custom", lambda model, batch: (model(**batch).logits, batch["labels"]))
Case = tuple[nn.Module, Objective, Callable[[list[int], int], dict[str, Tensor]]]


def classifier() -> Case:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    rows = token_rows()

    def batch(indices: list[int], length: int) -> dict[str, Tensor]:
        return padded([rows[index] for index in indices], length) | {"labels": torch.tensor(indices) % 3}

    return GPT2ForSequenceClassification(config), SEQUENCE_CLASSIFICATION, batch


def images(model: nn.Module, objective: Objective) -> Case:
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def batch(indices: list[int], length: int) -> dict[str, Tensor]:
        return {"pixel_values": pixels[indices], "labels": torch.tensor(indices) % 3}

    return model, objective, batch


def vit() -> Case:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return images(ViTForImageClassification(config), SEQUENCE_CLASSIFICATION)


def convolutions() -> Case:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)]
    return images(nn.Sequential(*layers), IMAGES)


def t5() -> Case:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=12, d_kv=6, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    rows = token_rows()

    def batch(indices: list[int], length: int) -> dict[str, Tensor]:
        return padded([rows[index] for index in indices], length)  # encoder and decoder of the same length

    return T5ForConditionalGeneration(config), SEQ2SEQ, batch


def causal(model: Any) -> Case:
    rows = token_rows()
    return model, CAUSAL_LM, lambda indices, length: padded([rows[index] for index in indices], length)


CASES: dict[str, Callable[[], Case]] = {
    "gpt2": lambda: causal(adapted(gpt2())),
    "llama": lambda: causal(llama()),
    "text classifier": classifier,
    "image transformer": vit,
    "convolutions": convolutions,
    "encoder-decoder": t5,
}


def features_of(case: Case) -> ForwardFeatures:
    model, objective, _ = case
    spec = "lora_B" if hasattr(model, "peft_config") else "linear"
    return ForwardFeatures(model, TrackedParameters.of(model, spec), objective)


@pytest.mark.parametrize("name", CASES)
def test_features_do_not_depend_on_batch_or_padding(name: str) -> None:
    case = CASES[name]()
    batch, compute = case[2], features_of((case[0].eval(), *case[1:]))
    together = compute(batch([0, 1, 2, 3, 4], 12))
    assert together.shape == (5, sum(compute.group_sizes))
    assert compute.leading < len(compute.group_sizes)  # tracked layers are among them
    assert together.dtype == torch.float32
    assert not together.requires_grad
    varies = [bool((part.std(0) > 0).any()) for part in together.split(compute.group_sizes, 1)]
    assert sum(varies) > len(varies) // 2
    lengths = [len(row["input_ids"]) for row in token_rows()]
    for index, length in enumerate(lengths):
        agree(compute(batch([index], length))[0], together[index], 1e-4)
    agree(features_of(case)(batch([4, 2], 12)), together[[4, 2]], 1e-4)


def test_products_are_gradients_with_the_last_error_in_place_of_the_own() -> None:
    """Where nothing is folded, those of the last layer before the final norm are Σ_t error_t ⊗ input_t."""
    model, batch = gpt2(), padded(token_rows())
    parameters = TrackedParameters.of(model, ["h.1.mlp.c_fc.weight"])
    compute = ForwardFeatures(model, parameters, CAUSAL_LM)
    features = compute(batch)
    kept: list[Tensor] = []
    model.transformer.h[-1].mlp.c_fc.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0]))
    model.transformer.ln_f.register_forward_hook(lambda _, inputs, output: kept.append(output))
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (gradient,) = torch.autograd.grad(-loss, kept[1])
    assert compute.group_sizes == [12, 12, 12, 144]  # the error, two layers, the product
    agree(features[:, :12], gradient.sum(1).float(), 1e-4)
    expected = torch.einsum("rta,rtb->rab", gradient, kept[0]).flatten(1)
    agree(features[:, 36:], expected.float(), 1e-4)


def test_error_at_the_logits_is_that_of_autograd() -> None:
    """A classifier's scores are no plain product with hidden states of every position."""
    model: Any
    model, objective, batch = classifier()
    rows = batch([0, 1, 2], 12)
    compute = features_of((model.eval(), objective, batch))
    error = compute(rows)[:, : compute.group_sizes[0]]
    kept: list[Tensor] = []
    handle = model.score.register_forward_hook(lambda _, inputs, output: kept.append(output))
    loss = nn.functional.cross_entropy(model(**rows).logits, rows["labels"], reduction="sum")
    handle.remove()
    (gradient,) = torch.autograd.grad(-loss, kept[0])
    assert compute.group_sizes[0] == 3
    agree(error, gradient.sum(1).float(), 1e-4)


def test_virtual_tokens_of_a_prompt_are_no_output_tokens() -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    plain, prompted = llama(), get_peft_model(llama(), settings).eval()
    spec = ["layers.1.mlp.down_proj.weight"]
    batch, kept = padded(token_rows(3)), list[Tensor]()
    compute = ForwardFeatures(prompted, TrackedParameters.of(prompted, spec), CAUSAL_LM)
    features = compute(batch)
    layer = prompted.base_model.model.layers[-1] if hasattr(prompted.base_model, "model") else plain.model.layers[-1]
    handle = layer.register_forward_hook(lambda _, inputs, output: kept.append(output))
    prompted(**batch)
    handle.remove()
    hidden = kept[0][:, 3:]
    hidden = hidden[:, : batch["labels"].shape[1] - 1]
    counts = (batch["labels"][:, 1:] != IGNORED).float().unsqueeze(-1)
    expected = (nn.functional.layer_norm(hidden.float(), hidden.shape[-1:]) * counts).sum(1) / counts.sum(1)
    start = sum(compute.group_sizes[: compute.leading - 1])
    agree(features[:, start : start + compute.group_sizes[compute.leading - 1]], expected, 1e-4)


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x - x.mean(0)


def test_rows_that_touch_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 3))
    objective = Objective("custom", lambda m, b: (m(b["x"]).unsqueeze(1), b["labels"].unsqueeze(1)))
    batch = {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(6) % 3}
    with pytest.raises(UnsupportedError, match="touch each other"):
        features_of((model, objective, lambda *_: {}))(batch)


def test_models_without_recordable_layers_are_refused() -> None:
    objective = Objective("custom", lambda m, b: (m(b["x"]).unsqueeze(1), b["labels"].unsqueeze(1)))
    with pytest.raises(UnsupportedError, match="no list of layers"):
        ForwardFeatures(Centred(), TrackedParameters((), (), ()), objective)
