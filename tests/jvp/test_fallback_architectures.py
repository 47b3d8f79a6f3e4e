"""Fallback architectures: models that resemble analytic ones and compute something else."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import hf_fwdattr.jvp.analytic
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.jvp import chunking
from hf_fwdattr.jvp.analytic import AnalyticJVP, TooLarge
from hf_fwdattr.jvp.backend import READOUT_OPTIONS, Backend
from hf_fwdattr.jvp.torch_func import TorchFuncJVP
from hf_fwdattr.layers.attention import attention_weights
from hf_fwdattr.layers.norm import NormJVP
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import adapted, finished, gpt2, llama, padded, token_rows
from tests.helpers.reference import agree
from tests.jvp.test_analytic import SIZES
from tests.jvp.test_backends import by_reverse_mode, random_directions


@pytest.mark.parametrize("choice", ["auto", "jvp"])
def test_experts_in_one_product_are_differentiated_one_by_one(choice: str) -> None:
    """transformers multiplies all experts of a mixture at once, which has no forward-mode derivative."""
    torch.manual_seed(0)
    sizes = MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    model = adapted(finished(MixtralForCausalLM(sizes), torch.float32), target_modules=["q_proj", "v_proj"])
    config = model.get_base_model().config
    before, batch = config._experts_implementation, padded(token_rows())
    parameters = TrackedParameters.of(model, "lora")
    directions = random_directions(parameters, 3)
    actual = Backend(model, parameters, choice).prepare(batch).jvp(directions)
    reference = copy.deepcopy(model)
    reference.get_base_model().config._experts_implementation = "eager"  # the product has no float64 either
    agree(actual, by_reverse_mode(reference, parameters, batch, directions.double()), 1e-4)
    assert config._experts_implementation == before == "grouped_mm"


def hooked(path: str, hook: Callable[..., Any], before: bool = False) -> nn.Module:
    """Return a Llama with a hook on one of its modules."""
    model = adapted(llama())
    module = model.base_model.model.get_submodule(path)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
    return model


def overwritten(model: nn.Module) -> nn.Module:
    """Change the output of an attention in place."""
    attention = model.base_model.model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return output.mul_(3.0), weights

    attention.forward = forward
    return model


def projected(model: PreTrainedModel) -> PreTrainedModel:
    """Put a Linear between the embeddings and the first layer."""
    torch.manual_seed(0)
    model.projection = nn.Linear(12, 12, bias=False).double()
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: (model.projection(inputs[0]), *inputs[1:]))
    return model.eval()


def doubled_inside(model: nn.Module) -> nn.Module:
    """Let a layer double its input before it starts."""
    layer: Any = model.get_submodule("base_model.model.model.layers.1")
    original = layer.forward
    layer.forward = lambda hidden_states, *args, **kwargs: original(2.0 * hidden_states, *args, **kwargs)
    return model


def shared(model: PreTrainedModel, one: str, other: str) -> PreTrainedModel:
    """Share one weight between two layers."""
    layers = model.model.layers
    layers.get_submodule(other).weight = layers.get_submodule(one).weight
    return model


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", amount=0.5)
    return model


def inactive_elsewhere() -> nn.Module:
    """Llama with a second, inactive adapter on other layers."""
    model = adapted(llama(), target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    return finished(model, torch.float64)


def other_method() -> nn.Module:
    return finished(
        get_peft_model(llama(), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])), torch.float64
    )


def with_another_tower() -> nn.Module:
    model = adapted(llama())
    model.base_model.model.tower = copy.deepcopy(model.base_model.model.model.layers)
    return model


def olmo2() -> nn.Module:
    """OLMo 2: query and key norms over all heads, and no norms before attention and MLP."""
    torch.manual_seed(0)
    return adapted(finished(Olmo2ForCausalLM(Olmo2Config(**SIZES)), torch.float64))


def smollm3() -> nn.Module:
    """SmolLM3: no rotary positions in every other layer."""
    torch.manual_seed(0)
    return adapted(finished(SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0])), torch.float64))


def weakly_capped() -> nn.Module:
    """Gemma 2 with attention logits so small that their cap hardly changes any value."""
    torch.manual_seed(0)
    settings = SIZES | dict(query_pre_attn_scalar=6, final_logit_softcapping=None, attn_logit_softcapping=50.0)
    return adapted(Gemma2ForCausalLM(Gemma2Config(**settings, attn_implementation="eager")).double().eval())


@pytest.mark.parametrize(
    ("make", "spec", "why"),
    [
        (lambda: hooked("model.layers.0.self_attn.q_proj", lambda _, __, y: 3 * y), "lora_B", "q_proj does not"),
        (lambda: hooked("model.layers.0.mlp.up_proj", lambda _, __, y: y.mul_(1.02)), "lora_B", "up_proj does not"),
        (lambda: hooked("model.layers.1.mlp.gate_proj", lambda _, __, y: y.sin()), "lora_B", "gate_proj does not"),
        (
            lambda: hooked("model.layers.1.self_attn.v_proj.lora_B.default", lambda _, __, y: 5 * y),
            "lora_B",
            "v_proj does not compute",
        ),
        (lambda: hooked("model.layers.0.mlp", lambda _, __, y: 1.00002 * y), "lora_B", "does not add its blocks"),
        (lambda: hooked("model.layers.0.self_attn", lambda _, __, y: (2 * y[0], *y[1:])), "lora_B", "does not add"),
        (lambda: hooked("model.layers.1.mlp.gate_proj", lambda _, x: (2 * x[0],), True), "lora_B", "different inputs"),
        (lambda: doubled_inside(adapted(llama())), "lora_B", "does not add its blocks"),
        (lambda: projected(llama()), r"projection\.weight", "is tracked and is in no analytic layer"),
        (lambda: hooked("lm_head", lambda _, x: (2 * x[0],), True), "lora_B", "not exactly one norm"),
        (lambda: overwritten(adapted(llama())), "lora_B", "o_proj does not"),
        (lambda: shared(llama(), "0.self_attn.q_proj", "1.self_attn.q_proj"), r"q_proj\.weight", "used in 2 places"),
        (lambda: shared(llama(), "1.mlp.gate_proj", "1.mlp.up_proj"), r"gate_proj\.weight", "used in 2 places"),
        (lambda: pruned(llama()), r"q_proj\.weight_orig", "not a weight of a Linear layer"),
        (inactive_elsewhere, r"lora_B\..*weight", "is tracked, but its adapter is merged or disabled"),
        (other_method, r"o_proj\.weight", "no analytic JVP"),
        (with_another_tower, r"model\.layers.*lora_B", "tower.* takes no part in the forward pass"),
        (olmo2, "lora_B", "there is no norm before"),
        (smollm3, "lora_B", "layers.1.self_attn does not"),
        (weakly_capped, "lora_B", "self_attn is an attention for which there is no analytic JVP"),
    ],
    ids=[
        "projection tripled", "a fiftieth more, in place", "sine of the gate", "B times five", "a hair more",
        "attention doubled", "gate's input doubled", "doubled inside",
        "projected embeddings",
        "last state doubled", "overwritten", "one weight in two layers", "one weight twice in a layer", "pruned",
        "inactive elsewhere", "IA3", "another tower", "OLMo 2", "SmolLM3", "weak cap",
    ],
)  # fmt: skip
def test_changed_model_falls_back_to_torch_func(make: Callable[[], nn.Module], spec: str, why: str) -> None:
    model = make()
    parameters, batch = TrackedParameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters, 2, torch.float64)
    with pytest.raises(UnsupportedError, match=why):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    derivatives = Backend(model, parameters).prepare(batch).jvp(directions)
    assert torch.equal(derivatives, TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [(Ernie4_5ForCausalLM, Ernie4_5Config, {}), (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layers": [1, 0]})],
    ids=["turned pair by pair", "turned in every other layer"],
)
def test_rotary_differences_are_detected_under_nearly_uniform_attention(
    kind: type[PreTrainedModel], config: type, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """As after initialisation, when wrong derivatives by query weights leave no trace in values."""
    torch.manual_seed(0)
    model, batch = kind(config(**SIZES, initializer_range=0.002, **changes)).to(dtype).eval(), padded(token_rows())
    with pytest.raises(UnsupportedError, match="self_attn does not"):
        AnalyticJVP(model, TrackedParameters.of(model, r"q_proj\.weight"), CAUSAL_LM, batch)


def test_layer_that_runs_twice_is_refused() -> None:
    model, batch = llama(), padded(token_rows())
    model.model.layers.insert(0, model.model.layers[0])
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedError, match="called twice in one forward pass"):
        AnalyticJVP(model, TrackedParameters.of(model, r"layers\.2.*v_proj"), CAUSAL_LM, batch)


def test_autocast_after_preparation_changes_nothing() -> None:
    model, batch = adapted(llama(torch.float32)), padded(token_rows())
    parameters = TrackedParameters.of(model)
    directions = random_directions(parameters, 2)
    prepared = AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    expected = prepared.jvp(directions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepared.jvp(directions), expected)


def test_float64_model_never_uses_half_precision() -> None:
    model, batch = adapted(llama()), padded(token_rows())
    parameters = TrackedParameters.of(model)
    directions = random_directions(parameters, 2, torch.float64)
    derivatives = Backend(model, parameters, precision="half").prepare(batch).jvp(directions)
    assert torch.equal(derivatives, AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions))


def test_model_that_bypasses_its_output_layer_is_refused() -> None:
    model, batch = llama(), padded(token_rows())

    def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> CausalLMOutput:
        hidden = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=hidden @ model.lm_head.weight.T)

    model.forward = forward
    parameters = TrackedParameters.of(model, r"q_proj\.weight")
    with pytest.raises(UnsupportedError, match="output layer was not called, or its hooks were not"):
        Backend(model, parameters).prepare(batch).jvp(random_directions(parameters, 2, torch.float64))


class Lengthless(nn.Module):
    """A wrapper as of `torch.compile`, whose length must not be asked for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __len__(self) -> int:
        raise TypeError("a model has no length")


def test_model_without_length_is_accepted() -> None:
    model, batch = adapted(llama()), padded(token_rows())
    wrapped = Lengthless(model).eval()
    one, other = TrackedParameters.of(model), TrackedParameters.of(wrapped)
    directions = random_directions(one, 2, torch.float64)
    derivatives = Backend(wrapped, other).prepare(batch).jvp(directions)
    agree(derivatives, TorchFuncJVP(model, one, CAUSAL_LM, batch).jvp(directions), 1e-6)


def test_gradient_predictor_skips_attention_without_analytic_layers() -> None:
    model, batch = olmo2(), padded(token_rows())
    predictor = GradientPredictor(model, TrackedParameters.of(model), CAUSAL_LM)
    projections = predictor.fit([batch])
    assert any(path.endswith("k_proj") for path in projections)  # an analytic attention has them at its end only
    assert bool(predictor(batch).isfinite().all())


def test_hook_on_the_output_layer_is_respected() -> None:
    model, batch = hooked("lm_head", lambda _, __, y: 2 * y), padded(token_rows())
    parameters = TrackedParameters.of(model)
    directions = random_directions(parameters, dtype=torch.float64)
    derivatives = Backend(model, parameters).prepare(batch).jvp(directions)
    agree(derivatives, by_reverse_mode(model, parameters, batch, directions), 2e-5)


def test_tracked_base_weight_is_correct_with_and_without_adapter() -> None:
    model, batch = adapted(llama()), padded(token_rows())
    parameters = TrackedParameters.of(model, r"down_proj\.weight$")
    directions = random_directions(parameters, dtype=torch.float64)
    derivatives = []
    for state in (nullcontext, model.disable_adapter):
        with state():
            derivatives.append(AnalyticJVP(model, parameters, CAUSAL_LM, batch).jvp(directions))
            agree(derivatives[-1], TorchFuncJVP(model, parameters, CAUSAL_LM, batch).jvp(directions), 1e-6)
    assert float((derivatives[0] - derivatives[1]).norm() / derivatives[0].norm()) > 0.01


@pytest.mark.parametrize("state", ["merged", "switched off", "another is active"])
def test_inactive_adapters_are_refused_by_every_readout(state: str) -> None:
    model, batch = adapted(llama()), padded(token_rows())
    parameters = TrackedParameters.of(model)
    if state == "merged":
        model.merge_adapter()
    elif state == "switched off":
        model.base_model.disable_adapter_layers()
    else:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter("other")
        model.eval()
    directions = random_directions(parameters, dtype=torch.float64)
    for readout in READOUT_OPTIONS:
        with pytest.raises(UnsupportedError, match=r"every score would be zero; call model\.unmerge"):
            Backend(model, parameters, readout).prepare(batch).jvp(directions)


@pytest.mark.parametrize("readout", ["auto", "jvp"])
@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_float16_derivatives_scale_with_the_direction(readout: str, size: float) -> None:
    model, batch = adapted(gpt2(torch.float16)), padded(token_rows())
    parameters = TrackedParameters.of(model)
    directions = random_directions(parameters)
    prepared = Backend(model, parameters, readout).prepare(batch)
    agree(prepared.jvp(size * directions), size * prepared.jvp(directions), 3e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_is_not_taken_for_a_layer_norm(dtype: torch.dtype) -> None:
    """The input has zero mean, where both agree, and its tangent has not."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(256).to(dtype).requires_grad_(False)
    x, moved = torch.randn(1, 5, 256, dtype=torch.float64), 1.0 + torch.randn(3, 1, 5, 256, dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)).to(dtype)
    derivatives = NormJVP("norm", norm, x, norm(x)).jvp(moved)

    def by_hand(wide: Tensor) -> Tensor:
        return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    exact = torch.stack([torch.func.jvp(by_hand, (x.double(),), (tangent,))[1] for tangent in moved])
    agree(derivatives, exact, 1e-5)


def test_large_gains_that_are_offsets_from_one_are_recognized() -> None:
    torch.manual_seed(0)
    norm = Gemma2RMSNorm(64).bfloat16().requires_grad_(False)
    norm.weight += 60.0
    x, moved = torch.randn(1, 4, 64).bfloat16(), torch.randn(2, 1, 4, 64)
    derivatives = NormJVP("norm", norm, x, norm(x)).jvp(moved)
    exact = torch.stack([torch.func.jvp(norm.float(), (x.float(),), (t,))[1] for t in moved])
    agree(derivatives, exact, 1e-4)


def test_sharp_attention_is_accurate_in_half_precision() -> None:
    """Logits of some tens, as in trained models; rounded to eight bits they would be off by a tenth."""
    torch.manual_seed(0)
    query, key = (5.0 * torch.randn(1, 2, 12, 16).bfloat16() for _ in range(2))
    exact = attention_weights(query.double(), key.double(), 0.25, None)
    derivatives = attention_weights(query, key, 0.25, None)
    assert derivatives.dtype == torch.bfloat16
    agree(derivatives, exact, 4e-3)


def test_attention_weights_count_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama())
    parameters = TrackedParameters.of(model)

    def row(length: int) -> dict[str, Tensor]:
        return padded([{"input_ids": [1] * length, "labels": [1] * length}])

    short, long = (AnalyticJVP(model, parameters, CAUSAL_LM, row(length)) for length in (8, 64))
    assert short._widest == 4 * 8 * 20  # of an MLP
    assert long._widest == 4 * 2 * 64 * 64  # of two heads
    monkeypatch.setattr(chunking, "_CPU_BUDGET", 3 * chunking._ALIVE * long._widest)
    derivatives, sizes = long._derivatives, list[int]()

    def counted(directions: Tensor) -> Tensor:
        sizes.append(len(directions))
        return derivatives(directions)

    monkeypatch.setattr(long, "_derivatives", counted)
    long.jvp(torch.ones(8, parameters.size, dtype=torch.float64))
    assert sizes == [3, 3, 2]
    widths = 2 * (12 + 6 + 6 + 12 + 20 + 20 + 12)
    monkeypatch.setattr(hf_fwdattr.jvp.analytic, "_CPU_RECORDED", 3 * 4 * 64 * (widths + 64))
    with pytest.raises(TooLarge):
        AnalyticJVP(model, parameters, CAUSAL_LM, row(64))
