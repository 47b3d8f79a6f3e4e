"""Features of one forward pass: the same alone, in a batch and padded, for every kind of model; what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
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
from tests.helpers.cases import VOCABULARY, adapted, gpt2, llama, padded, token_rows


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


@pytest.mark.parametrize("name", CASES)
def test_features_do_not_depend_on_batch_or_padding(name: str) -> None:
    model, objective, batch = CASES[name]()
    compute = ForwardFeatures(model.eval(), objective, width=10, sketch=4)
    together = compute(batch([0, 1, 2, 3, 4], 12))
    assert together.shape == (5, sum(compute.group_sizes))
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert bool((together.std(0) > 0).any())
    lengths = [len(row["input_ids"]) for row in token_rows()]
    for index, length in enumerate(lengths):
        torch.testing.assert_close(compute(batch([index], length))[0], together[index], rtol=1e-4, atol=1e-4)
    again = ForwardFeatures(model, objective, width=10, sketch=4)
    torch.testing.assert_close(again(batch([4, 2], 12)), together[[4, 2]], rtol=1e-4, atol=1e-4)


def test_sketches_are_sums_of_outer_products() -> None:
    """At full width nothing is folded, and the last layer's sketch is Σ_t error_t ⊗ hidden_t by autograd."""
    model, batch = gpt2(), padded(token_rows())
    compute = ForwardFeatures(model, CAUSAL_LM, layers=1, width=64, sketch=64)
    features = compute(batch)
    kept: list[Tensor] = []
    model.transformer.h[-1].register_forward_hook(lambda _, __, output: kept.append(output))
    model.transformer.ln_f.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (gradient,) = torch.autograd.grad(-loss, kept[1])
    hidden = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:])
    expected = torch.einsum("rta,rtb->rab", gradient, hidden).flatten(1)
    assert compute.group_sizes == [12, 144, 12]
    torch.testing.assert_close(features[:, 12:156].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[:, 156:].double(), gradient.sum(1), rtol=1e-4, atol=1e-5)


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x - x.mean(0)


def test_rows_that_touch_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 3))
    objective = Objective("custom", lambda m, b: (m(b["x"]).unsqueeze(1), b["labels"].unsqueeze(1)))
    batch = {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(6) % 3}
    with pytest.raises(UnsupportedError, match="touch each other"):
        ForwardFeatures(model, objective)(batch)


def test_models_without_recordable_layers_are_refused() -> None:
    objective = Objective("custom", lambda m, b: (m(b["x"]).unsqueeze(1), b["labels"].unsqueeze(1)))
    batch = {"x": torch.randn(6, 3), "labels": torch.arange(6) % 3}
    with pytest.raises(UnsupportedError, match="one entry per row: none"):
        ForwardFeatures(Centred(), objective)(batch)
