"""Half precision and tracked output layers: exact hidden-state gradients, and a predictor all the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.output_head import hidden_state_gradients
from hf_fwdattr.models.parameters import TrackedParameters
from tests.gradients.test_predictor import exact
from tests.helpers.cases import adapted, llama, padded, token_rows
from tests.helpers.reference import agree
from tests.helpers.runs import ask, base, config, fine_tune, queries


CLASSES, WIDTH = 200, 32


def confident_tokens(doubt: float, count: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, hidden states, logits and labels, float64, of tokens with 1 - p_y near `doubt`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (1, count), generator=generator)
    noise = torch.randn(1, count, WIDTH, generator=generator, dtype=torch.float64)
    low, high = torch.zeros(1, count, 1).double(), torch.full((1, count, 1), 40.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        hidden = 0.3 * noise + middle * weight[labels] / WIDTH
        others = 1 - (hidden @ weight.T).softmax(-1).gather(-1, labels.unsqueeze(-1))
        low, high = torch.where(others > doubt, middle, low), torch.where(others > doubt, high, middle)
    return weight, hidden, hidden @ weight.T, labels


def subtracted(weight: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """W_y - sum_v p_v W_v, whose terms cancel."""
    return weight[labels].float() - (logits.float().softmax(-1).to(weight.dtype) @ weight).float()


# dtype, 1 - p_y: relative error of the hidden-state gradient, at most; and of the two terms subtracted, at least.
ERRORS = [
    (torch.bfloat16, 1e-1, 1e-2, 1e-2),
    (torch.bfloat16, 1e-2, 1e-2, 1e-1),
    (torch.bfloat16, 1e-3, 1e-2, 0.2),
    (torch.bfloat16, 1e-5, 1e-2, 0.1),
    (torch.float16, 1e-3, 2e-3, 0.05),
    (torch.float32, 1e-1, 2e-6, 0.0),
    (torch.float32, 1e-3, 2e-6, 1e-5),
    (torch.float32, 1e-5, 2e-6, 1e-5),
]


@pytest.mark.parametrize(("dtype", "doubt", "largest", "before"), ERRORS)
def test_hidden_state_gradients_of_confident_tokens_are_exact(
    dtype: torch.dtype, doubt: float, largest: float, before: float
) -> None:
    """Of the same rounded weights and logits, in float64."""
    weight, hidden, _, labels = (
        part.to(dtype) if part.is_floating_point() else part for part in confident_tokens(doubt)
    )
    head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=dtype)
    head.weight.data = weight
    logits = head(hidden).detach()
    p = logits.double().softmax(-1)
    one_hot = nn.functional.one_hot(labels, CLASSES)
    expected = (one_hot - p) @ weight.double()
    gradients = hidden_state_gradients(head, hidden, logits, logits, labels)
    assert gradients is not None
    agree(gradients, expected, largest)
    lost = (subtracted(weight, logits, labels).double() - expected).norm() / expected.norm()
    assert float(lost) >= before


def aligned(model: Any, spec: str = "lora") -> float:
    """Return the median cosine of predicted gradients with exact ones, on rows that were not fitted."""
    parameters, rows = TrackedParameters.of(model, spec), token_rows(60)
    predictor = GradientPredictor(model, parameters, CAUSAL_LM)
    predictor.fit(padded(rows[at : at + 10]) for at in range(0, 40, 10))
    batch = padded(rows[40:])
    return float(nn.functional.cosine_similarity(predictor(batch), exact(model, parameters, batch).float()).median())


def test_predictor_works_in_bfloat16() -> None:
    assert aligned(adapted(llama(torch.bfloat16))) > 0.8


def test_predictor_works_where_autocast_is_inside_the_model() -> None:
    """As accelerate's mixed precision puts it."""
    model: Any = adapted(llama(torch.float32))
    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert aligned(model) > 0.8


def test_fit_under_autocast_sums_in_full_precision() -> None:
    model, rows = adapted(llama(torch.float32)), token_rows(40)
    parameters = TrackedParameters.of(model, "lora")
    inside: Any = adapted(llama(torch.float32))
    inside.forward = torch.autocast("cpu", torch.bfloat16)(inside.forward)
    expected = GradientPredictor(inside, parameters, CAUSAL_LM).fit([padded(rows)])
    with torch.autocast("cpu", torch.bfloat16):
        actual = GradientPredictor(model, parameters, CAUSAL_LM).fit([padded(rows)])
    for path, value in expected.items():
        agree(actual[path], value, 1e-5)


@pytest.mark.parametrize("kind", ["full", "lora", "trained copy"])
def test_gradient_of_a_tracked_output_layer_is_exact(kind: str) -> None:
    model: Any = llama()
    if kind == "lora":
        model = adapted(model, target_modules=["q_proj", "lm_head"])
    if kind == "trained copy":
        model = adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    parameters, batch = TrackedParameters.of(model, r"lm_head\.(lora_.*)?weight"), padded(token_rows())
    predictor = GradientPredictor(model, parameters, CAUSAL_LM)
    assert predictor.fit([batch]) == {}
    agree(predictor(batch), exact(model, parameters, batch), 2e-5)


@pytest.mark.parametrize(
    ("parameters", "changes"), [("lora_B", {"bf16": True}), ("linear", {}), ("linear", {"bf16": True})]
)
def test_banks_of_mixed_precision_and_full_fine_tunes_keep_a_predictor(
    tmp_path: Path, parameters: str, changes: dict[str, Any]
) -> None:
    model: Any = llama(torch.float32) if parameters == "linear" else adapted(base(torch.float32))
    bank = fine_tune(tmp_path, model, config(parameters=parameters), **changes).bank
    assert bank is not None
    assert bank.manifest.error_projections
    assert bank.manifest.predictor_missing is None
    pipe = ask(model.eval(), bank)
    staged, exact_scores = pipe.scores(queries(2), budget=6), pipe.scores(queries(2), budget="all")
    assert staged.shape == exact_scores.shape
    assert float(nn.functional.cosine_similarity(staged, exact_scores).min()) > 0.5
