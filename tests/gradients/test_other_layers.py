"""Gradients and directional derivatives of layers other than Linear: convolutions, embeddings, norms, tied weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.per_sample import PerSampleGradients
from hf_fwdattr.jvp.backend import METHODS
from hf_fwdattr.models.likelihood import SEQUENCE_CLASSIFICATION, Batch, Objective, resolve_objective
from hf_fwdattr.models.modes import frozen, refuse_batch_statistics
from hf_fwdattr.models.parameters import TrackedParameters
from tests.gradients.test_per_sample import rows_alone
from tests.helpers.reference import agree


CLASSES = 3


class Net(nn.Module):
    """A layer under test between others, and a head; x is (rows, channels, ...)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y.flatten(1).tanh())


class Shared(nn.Module):
    """One convolution applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x).tanh().mean(1)))


IMAGES: dict[str, Callable[[], list[nn.Module]]] = {
    "convolution": lambda: [nn.Conv2d(2, 3, 3)],
    "strided, grouped, padded": lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False)],
    "transposed": lambda: [nn.ConvTranspose2d(2, 3, 2, stride=2)],
    "convolution and batch norm": lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)],
    "group norm": lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)],
    "instance norm": lambda: [nn.InstanceNorm2d(2, affine=True)],
    "layer norm": lambda: [nn.LayerNorm([2, 5, 5])],
    "rms norm": lambda: [nn.RMSNorm(5)],
    "one convolution twice": lambda: [Shared()],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))],
    "frozen below": lambda: [nn.Conv2d(2, 3, 3).requires_grad_(False), nn.GroupNorm(1, 3)],
}
SEQUENCES: dict[str, Callable[[], list[nn.Module]]] = {
    "one-dimensional": lambda: [nn.Conv1d(2, 3, 3, dilation=2)],
    "recurrent": lambda: [nn.GRU(25, 3, batch_first=True)],
}
NO_FORWARD_DERIVATIVE = ["weight norm"]
TOKENS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: Net(nn.Embedding(5, 3, padding_idx=0), nn.LayerNorm(3)),
    "tied embedding": Tied,
}
NET = Objective("custom", lambda model, batch: (model(batch["x"]).unsqueeze(1), batch["labels"].unsqueeze(1)))


def world(kind: str) -> tuple[nn.Module, Batch]:
    """A model in float64 and evaluation mode, its norms moved off their initial ones and zeros; five rows."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind in TOKENS:
        x = torch.randint(0, 5, (5, 4), generator=generator)
        model: nn.Module = TOKENS[kind]().double()
    else:
        shape = (5, 2, 5, 5) if kind in IMAGES else (5, 2, 25)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        model = Net(*(IMAGES | SEQUENCES)[kind]()).double()
    model(x)  # batch norms count these statistics; the lazy head learns its size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval(), {"x": x, "labels": torch.randint(0, CLASSES, (5,), generator=generator)}


@pytest.mark.parametrize("kind", [*IMAGES, *SEQUENCES, *TOKENS])
def test_row_gradients_equal_those_of_rows_alone(kind: str) -> None:
    model, batch = world(kind)
    parameters = TrackedParameters.of(model, "trainable")
    with frozen(model):
        gradients, tokens = PerSampleGradients(model, parameters, NET)(batch)
    agree(gradients, rows_alone(model, parameters, NET, batch), 1e-9)
    assert tokens.tolist() == [1] * 5


READABLE = [  # forward mode of the others is refused: the test below
    (kind, method)
    for kind in [*IMAGES, *SEQUENCES, *TOKENS]
    for method in METHODS
    if method != "jvp" or kind not in NO_FORWARD_DERIVATIVE
]


@pytest.mark.parametrize(("kind", "method"), READABLE)
def test_directional_derivatives_are_products_with_gradients(kind: str, method: str) -> None:
    model, batch = world(kind)
    parameters = TrackedParameters.of(model, "trainable")
    alone = rows_alone(model, parameters, NET, batch)
    # Directions are made of responses, and these of gradients: a padding vector, which never moves, is in neither.
    directions = torch.randn(3, len(alone), generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ alone
    values = METHODS[method](model, parameters, NET, batch).jvp(directions).sum(1)
    agree(values, -alone @ directions.T, 1e-9 if method == "jvp" else 1e-5)


@pytest.mark.parametrize("kind", NO_FORWARD_DERIVATIVE)
def test_layers_without_forward_derivative_name_the_other_backend(kind: str) -> None:
    model, batch = world(kind)
    parameters = TrackedParameters.of(model, "trainable")
    directions = torch.randn(2, parameters.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="readout='difference'"):
        METHODS["jvp"](model, parameters, NET, batch).jvp(directions)


@pytest.mark.parametrize("tracks", [True, False])
def test_batch_norm_with_batch_statistics_is_refused(tracks: bool) -> None:
    model = Net(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=tracks))
    model(torch.randn(2, 2, 5, 5))
    model.eval()
    with pytest.raises(UnsupportedError, match=r"layers\.1 is a BatchNorm2d"):
        refuse_batch_statistics(model, training=True)
    assert not any(module.training for module in model.modules())
    if tracks:
        refuse_batch_statistics(model)
        return
    with pytest.raises(UnsupportedError, match="statistics of its batch"):
        PerSampleGradients(model, TrackedParameters.of(model, "trainable"), NET)


def test_batch_norm_in_evaluation_mode_is_accepted() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> "Frozen":
            return super().train(False)

    model = Net(nn.Conv2d(2, 2, 3), Frozen(2)).double().train()
    refuse_batch_statistics(model, training=True)
    assert model.training
    assert not model.layers[1].training


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=12, num_labels=CLASSES,
        )
    )  # fmt: skip


def convnext() -> PreTrainedModel:
    return ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=1, patch_size=2, hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, num_labels=CLASSES
        )
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


@pytest.mark.parametrize("make", [vit, convnext, resnet])
def test_image_classifiers_have_gradients_and_derivatives(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    assert resolve_objective(model) is SEQUENCE_CLASSIFICATION
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    batch = {"pixel_values": images, "labels": torch.tensor([0, 2, 1, 1])}
    parameters = TrackedParameters.of(model, "trainable")
    with frozen(model):
        gradients, _ = PerSampleGradients(model, parameters, SEQUENCE_CLASSIFICATION)(batch)
    alone = rows_alone(model, parameters, SEQUENCE_CLASSIFICATION, batch)
    agree(gradients, alone, 1e-9)
    loss = model(**batch).loss
    mean = torch.autograd.grad(loss, parameters.tensors(model), allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).flatten()
        for p, g in zip(parameters.tensors(model), mean, strict=True)
    ]
    agree(gradients.mean(0), torch.cat(flat), 1e-6)
    directions = torch.randn(2, parameters.size, generator=generator, dtype=torch.float64)
    derivatives = METHODS["jvp"](model, parameters, SEQUENCE_CLASSIFICATION, batch).jvp(directions)
    agree(derivatives.sum(1), -alone @ directions.T, 1e-9)
