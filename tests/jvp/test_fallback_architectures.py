"""Models that look like what is written out and compute something else: left to torch, or refused; never guessed."""

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
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import hf_fwdattr.jvp.analytic as reading
import hf_fwdattr.jvp.chunking as memory
from hf_fwdattr.errors import UnsupportedError
from hf_fwdattr.gradients.predictor import GradientPredictor
from hf_fwdattr.jvp import torch_func as jvp
from hf_fwdattr.jvp.analytic import AnalyticJVP, TooLarge
from hf_fwdattr.jvp.backend import READOUTS, Backend
from hf_fwdattr.layers.attention import attention_weights
from hf_fwdattr.layers.norm import Norm
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.parameters import Parameters
from tests.helpers.cases import adapted, finished, gpt2, llama, padded, token_rows
from tests.helpers.reference import agree
from tests.jvp.test_backends import by_reverse_mode, random_directions
from tests.jvp.test_analytic import SIZES


def hooked(path: str, hook: Callable[..., Any], before: bool = False) -> nn.Module:
    """A Llama on which somebody has put a hook."""
    model = adapted(llama())
    module = model.base_model.model.get_submodule(path)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
    return model


def overwritten(model: nn.Module) -> nn.Module:
    """What an attention returns is changed where it lies, so that nobody sees it as it was."""
    attention = model.base_model.model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output, weights = own(*args, **kwargs)
        return output.mul_(3.0), weights

    attention.forward = forward
    return model


def projected(model: PreTrainedModel) -> PreTrainedModel:
    """A Linear between the embeddings and the first layer."""
    torch.manual_seed(0)
    model.projection = nn.Linear(12, 12, bias=False).double()
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: (model.projection(inputs[0]), *inputs[1:]))
    return model.eval()


def doubled_inside(model: nn.Module) -> nn.Module:
    """A layer begins with something else than what it is handed."""
    layer: Any = model.get_submodule("base_model.model.model.layers.1")
    own = layer.forward
    layer.forward = lambda hidden_states, *args, **kwargs: own(2.0 * hidden_states, *args, **kwargs)
    return model


def shared(model: PreTrainedModel, one: str, other: str) -> PreTrainedModel:
    """One weight in two places."""
    layers = model.model.layers
    layers.get_submodule(other).weight = layers.get_submodule(one).weight
    return model


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", amount=0.5)
    return model


def resting_elsewhere() -> nn.Module:
    """A second adapter on other layers, which is not active."""
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
    """Its norms of queries and keys take all heads together, and its layers have no norms before their blocks."""
    torch.manual_seed(0)
    return adapted(finished(Olmo2ForCausalLM(Olmo2Config(**SIZES)), torch.float64))


def smollm3() -> nn.Module:
    """Every other layer knows no positions."""
    torch.manual_seed(0)
    return adapted(finished(SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0])), torch.float64))


def weakly_capped() -> nn.Module:
    """Gemma 2 with logits of attention so small that its cap hardly shows in values."""
    torch.manual_seed(0)
    settings = SIZES | dict(query_pre_attn_scalar=6, final_logit_softcapping=None, attn_logit_softcapping=50.0)
    return adapted(Gemma2ForCausalLM(Gemma2Config(**settings, attn_implementation="eager")).double().eval())


@pytest.mark.parametrize(
    ("make", "spec", "why"),
    [
        (lambda: hooked("model.layers.0.self_attn.q_proj", lambda _, __, y: 3 * y), "lora_B", "q_proj computes"),
        (lambda: hooked("model.layers.0.mlp.up_proj", lambda _, __, y: y.mul_(1.02)), "lora_B", "up_proj computes"),
        (lambda: hooked("model.layers.1.mlp.gate_proj", lambda _, __, y: y.sin()), "lora_B", "gate_proj computes"),
        (
            lambda: hooked("model.layers.1.self_attn.v_proj.lora_B.default", lambda _, __, y: 5 * y),
            "lora_B",
            "v_proj computes",
        ),
        (lambda: hooked("model.layers.0.mlp", lambda _, __, y: 1.00002 * y), "lora_B", "adds up its blocks"),
        (lambda: hooked("model.layers.0.self_attn", lambda _, __, y: (2 * y[0], *y[1:])), "lora_B", "adds up its"),
        (lambda: hooked("model.layers.1.mlp.gate_proj", lambda _, x: (2 * x[0],), True), "lora_B", "different places"),
        (lambda: doubled_inside(adapted(llama())), "lora_B", "adds up its blocks"),
        (lambda: projected(llama()), r"projection\.weight", "responds and is in no layer"),
        (lambda: hooked("lm_head", lambda _, x: (2 * x[0],), True), "lora_B", "something else than a norm"),
        (lambda: overwritten(adapted(llama())), "lora_B", "o_proj computes"),
        (lambda: shared(llama(), "0.self_attn.q_proj", "1.self_attn.q_proj"), r"q_proj\.weight", "used in 2 places"),
        (lambda: shared(llama(), "1.mlp.gate_proj", "1.mlp.up_proj"), r"gate_proj\.weight", "used in 2 places"),
        (lambda: pruned(llama()), r"q_proj\.weight_orig", "not of a Linear layer"),
        (resting_elsewhere, "lora_B", "responds, but its adapter is merged or switched off"),
        (other_method, r"o_proj\.weight", "not written out"),
        (with_another_tower, r"model\.layers.*lora_B", "tower.* takes no part in this pass"),
        (olmo2, "lora_B", "there is no norm before"),
        (smollm3, "lora_B", "layers.1.self_attn computes something else"),
        (weakly_capped, "lora_B", "self_attn is an attention that is not written out"),
    ],
    ids=[
        "projection tripled", "a fiftieth more, in place", "sine of the gate", "B times five", "a hair more",
        "attention doubled", "gate's input doubled", "doubled inside",
        "projected embeddings",
        "last state doubled", "overwritten", "one weight in two layers", "one weight twice in a layer", "pruned",
        "resting elsewhere", "IA3", "another tower", "OLMo 2", "SmolLM3", "weak cap",
    ],
)  # fmt: skip
def test_it_is_left_to_torch(make: Callable[[], nn.Module], spec: str, why: str) -> None:
    model = make()
    parameters, batch = Parameters.of(model, spec), padded(token_rows())
    directions = random_directions(parameters, 2, torch.float64)
    with pytest.raises(UnsupportedError, match=why):
        AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    found = Backend(model, parameters).opened(batch)(directions)
    assert torch.equal(found, jvp.read(model, parameters, CAUSAL_LM, batch, directions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [(Ernie4_5ForCausalLM, Ernie4_5Config, {}), (SmolLM3ForCausalLM, SmolLM3Config, {"no_rope_layers": [1, 0]})],
    ids=["turned pair by pair", "turned in every other layer"],
)
def test_what_queries_go_through_shows_where_attention_is_nearly_uniform(
    kind: type[PreTrainedModel], config: type, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """As after initialisation: derivatives along queries' weights would be off by half, and values by nothing."""
    torch.manual_seed(0)
    model, batch = kind(config(**SIZES, initializer_range=0.002, **changes)).to(dtype).eval(), padded(token_rows())
    with pytest.raises(UnsupportedError, match="self_attn computes something else"):
        AnalyticJVP(model, Parameters.of(model, r"q_proj\.weight"), CAUSAL_LM, batch)


def test_a_layer_that_runs_twice_is_refused() -> None:
    model, batch = llama(), padded(token_rows())
    model.model.layers.insert(0, model.model.layers[0])
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedError, match="used twice in one pass"):
        AnalyticJVP(model, Parameters.of(model, r"layers\.2.*v_proj"), CAUSAL_LM, batch)


def test_autocast_that_begins_later_rounds_nothing() -> None:
    model, batch = adapted(llama(torch.float32)), padded(token_rows())
    parameters = Parameters.of(model)
    directions = random_directions(parameters, 2)
    tangents = AnalyticJVP(model, parameters, CAUSAL_LM, batch)
    expected = tangents.along(directions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tangents.along(directions), expected)


def test_a_model_in_float64_is_never_read_in_half_precision() -> None:
    model, batch = adapted(llama()), padded(token_rows())
    parameters = Parameters.of(model)
    directions = random_directions(parameters, 2, torch.float64)
    found = Backend(model, parameters, precision="half").opened(batch)(directions)
    assert torch.equal(found, AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions))


def test_a_model_that_does_not_call_its_output_layer_is_refused() -> None:
    model, batch = llama(), padded(token_rows())

    def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> CausalLMOutput:
        hidden = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=hidden @ model.lm_head.weight.T)

    model.forward = forward
    parameters = Parameters.of(model, r"q_proj\.weight")
    with pytest.raises(UnsupportedError, match="output layer was not called, or its hooks were not"):
        Backend(model, parameters).opened(batch)(random_directions(parameters, 2, torch.float64))


class Lengthless(nn.Module):
    """As what `torch.compile` returns: what it wraps has no length, and asking for it is an error."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __len__(self) -> int:
        raise TypeError("a model has no length")


def test_nobody_asks_a_model_for_its_length() -> None:
    model, batch = adapted(llama()), padded(token_rows())
    wrapped = Lengthless(model).eval()
    one, other = Parameters.of(model), Parameters.of(wrapped)
    directions = random_directions(one, 2, torch.float64)
    found = Backend(wrapped, other).opened(batch)(directions)
    agree(found, jvp.read(model, one, CAUSAL_LM, batch, directions), 1e-6)


def test_a_first_look_does_without_what_it_cannot_write_out() -> None:
    model, batch = olmo2(), padded(token_rows())
    look = GradientPredictor(model, Parameters.of(model), CAUSAL_LM)
    maps = look.fit([batch])
    assert any(path.endswith("k_proj") for path in maps)  # of an attention that is written out only ends have maps
    assert bool(look(batch).isfinite().all())


def test_logits_that_a_hook_changes_are_read_as_they_are() -> None:
    model, batch = hooked("lm_head", lambda _, __, y: 2 * y), padded(token_rows())
    parameters = Parameters.of(model)
    directions = random_directions(parameters, dtype=torch.float64)
    found = Backend(model, parameters).opened(batch)(directions)
    agree(found, by_reverse_mode(model, parameters, batch, directions), 2e-5)


def test_a_weight_of_the_base_responds_as_it_does_without_its_adapter() -> None:
    model, batch = adapted(llama()), padded(token_rows())
    parameters = Parameters.of(model, r"down_proj\.weight$")
    directions = random_directions(parameters, dtype=torch.float64)
    found = []
    for state in (nullcontext, model.disable_adapter):
        with state():
            found.append(AnalyticJVP(model, parameters, CAUSAL_LM, batch).along(directions))
            agree(found[-1], jvp.read(model, parameters, CAUSAL_LM, batch, directions), 1e-6)
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 0.01


@pytest.mark.parametrize("state", ["merged", "switched off", "another is active"])
def test_adapters_that_all_rest_are_refused_whatever_the_way(state: str) -> None:
    model, batch = adapted(llama()), padded(token_rows())
    parameters = Parameters.of(model)
    if state == "merged":
        model.merge_adapter()
    elif state == "switched off":
        model.base_model.disable_adapter_layers()
    else:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
        model.set_adapter("other")
        model.eval()
    directions = random_directions(parameters, dtype=torch.float64)
    for way in ("auto", *READOUTS):
        with pytest.raises(UnsupportedError, match=r"every score would be zero; call model\.unmerge"):
            Backend(model, parameters, way).opened(batch)(directions)


@pytest.mark.parametrize("way", ["auto", "jvp"])
@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_float16_reads_along_directions_of_any_size(way: str, size: float) -> None:
    model, batch = adapted(gpt2(torch.float16)), padded(token_rows())
    parameters = Parameters.of(model)
    directions = random_directions(parameters)
    read = Backend(model, parameters, way).opened(batch)
    agree(read(size * directions), size * read(directions), 3e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_that_does_not_centre_is_not_taken_for_one_that_does(dtype: torch.dtype) -> None:
    """The mean of what comes in is nothing here, and what it moves by has one."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(256).to(dtype).requires_grad_(False)
    x, moved = torch.randn(1, 5, 256, dtype=torch.float64), 1.0 + torch.randn(3, 1, 5, 256, dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)).to(dtype)
    found = Norm("norm", norm, x, norm(x)).push(moved)

    def written_out(wide: Tensor) -> Tensor:
        return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    exact = torch.stack([torch.func.jvp(written_out, (x.double(),), (tangent,))[1] for tangent in moved])
    agree(found, exact, 1e-5)


def test_gains_that_are_offsets_from_one_are_told_apart_however_large() -> None:
    torch.manual_seed(0)
    norm = Gemma2RMSNorm(64).bfloat16().requires_grad_(False)
    norm.weight += 60.0
    x, moved = torch.randn(1, 4, 64).bfloat16(), torch.randn(2, 1, 4, 64)
    found = Norm("norm", norm, x, norm(x)).push(moved)
    exact = torch.stack([torch.func.jvp(norm.float(), (x.float(),), (t,))[1] for t in moved])
    agree(found, exact, 1e-4)


def test_sharp_attention_keeps_its_digits_in_half_precision() -> None:
    """Logits of some tens, as trained models have them: rounded to eight bits they would be off by a tenth."""
    torch.manual_seed(0)
    query, key = (5.0 * torch.randn(1, 2, 12, 16).bfloat16() for _ in range(2))
    exact = attention_weights(query.double(), key.double(), 0.25, None)
    found = attention_weights(query, key, 0.25, None)
    assert found.dtype == torch.bfloat16
    agree(found, exact, 4e-3)


def test_what_lies_between_all_positions_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama())
    parameters = Parameters.of(model)

    def row(length: int) -> dict[str, Tensor]:
        return padded([{"input_ids": [1] * length, "labels": [1] * length}])

    short, long = (AnalyticJVP(model, parameters, CAUSAL_LM, row(length)) for length in (8, 64))
    assert short._each == 4 * 8 * 20  # of an MLP
    assert long._each == 4 * 2 * 64 * 64  # of two heads
    monkeypatch.setattr(memory, "_CPU_BUDGET", 3 * memory._ALIVE * long._each)
    block, sizes = long._block, list[int]()

    def counted(directions: Tensor) -> Tensor:
        sizes.append(len(directions))
        return block(directions)

    monkeypatch.setattr(long, "_block", counted)
    long.along(torch.ones(8, parameters.size, dtype=torch.float64))
    assert sizes == [3, 3, 2]
    widths = 2 * (12 + 6 + 6 + 12 + 20 + 20 + 12)
    monkeypatch.setattr(reading, "_CPU_KEPT", 3 * 4 * 64 * (widths + 64))
    with pytest.raises(TooLarge):
        AnalyticJVP(model, parameters, CAUSAL_LM, row(64))
