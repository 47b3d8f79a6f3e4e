"""Scores that come with the tokens, against those of the finished text."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from hf_fwdattr.errors import NumericalError, QueryError, UnsupportedError
from hf_fwdattr.objective import CAUSAL_LM, IGNORED
from hf_fwdattr.parameters import Parameters
from hf_fwdattr.readout import jvp
from hf_fwdattr.readout.decoding import Decoding
from hf_fwdattr.streaming import streamed
from hf_fwdattr.tangent.decoding import WrittenDecoding
from tests.cases import ARCHITECTURES, DIGITS, VOCABULARY, adapted
from tests.reference import agree
from tests.runs import ask, base, config, fine_tune


PROMPT = torch.tensor([3, 5, 7])
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def parts(model: Any, spec: str = "lora") -> tuple[Parameters, torch.Tensor]:
    parameters = Parameters.of(model, spec)
    generator = torch.Generator().manual_seed(4)
    return parameters, torch.randn(5, parameters.size, generator=generator, dtype=torch.float64)


def by_torch(model: Any, parameters: Parameters, probes: torch.Tensor) -> Decoding:
    return Decoding(model, parameters, CAUSAL_LM, probes)


def written(model: Any, parameters: Parameters, probes: torch.Tensor) -> Decoding:
    return WrittenDecoding(model, parameters, CAUSAL_LM, probes, probes.dtype)


WAYS = [by_torch, written]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", ["lora", r"(layers|h)\.1\..*(v_proj|c_attn).*lora_B"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("sampled", [False, True])
def test_each_tokens_derivatives_are_those_of_the_finished_text(name: str, sampled: bool, spec: str, way: Any) -> None:
    model = adapted(ARCHITECTURES[name]())
    parameters, probes = parts(model, spec)
    settings = SETTINGS | ({"do_sample": True, "temperature": 1.5} if sampled else {})
    torch.manual_seed(11)
    found = list(streamed(model, way(model, parameters, probes), PROMPT, settings))
    torch.manual_seed(11)
    plain: Any = model.generate(input_ids=PROMPT[None], attention_mask=torch.ones_like(PROMPT)[None], **settings)
    assert [token for token, _ in found] == plain[0, 3:].tolist()
    labels = plain.clone()
    labels[:, :3] = IGNORED
    batch = {"input_ids": plain, "attention_mask": torch.ones_like(plain), "labels": labels}
    expected = jvp.read(model, parameters, CAUSAL_LM, batch, probes)[0, 2:]
    # Llama's norms compute in float32 whatever the model's type, and are written out in float64.
    agree(torch.stack([derivatives for _, derivatives in found]), expected, 1e-10 if way is by_torch else DIGITS[name])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model = adapted(base())
    return model, fine_tune(tmp_path_factory.mktemp("run"), model, config(probes=6)).bank


@pytest.mark.parametrize("readout", ["auto", "jvp"])
def test_a_stream_says_what_the_pipeline_says_afterwards(tuned: tuple[Any, Any], readout: str) -> None:
    attribute = ask(*tuned, readout=readout)
    said = list(attribute.stream("w1 w2", top_k=3, max_new_tokens=5, do_sample=False))
    after = attribute("w1 w2", budget="all", top_k=3, max_new_tokens=5, do_sample=False)
    assert [item["token"] for item in said] == after["tokens"]
    total: dict[str, float] = {}
    for item in said:
        for source in item["sources"]:
            total[source["source"]] = total.get(source["source"], 0.0) + source["score"]
    assert total == pytest.approx({s["source"]: s["score"] for s in after["sources"]}, rel=1e-4)
    last = said[-1]["examples"]
    assert [example["row"] for example in last] == [example["row"] for example in after["examples"]]
    assert [len(example["token_scores"]) for example in last] == [len(said)] * len(last)
    alone = list(attribute.stream("w1 w2", max_new_tokens=5, do_sample=False))
    assert all(item["examples"] == [] for item in alone)
    for one, other in zip(alone, said, strict=True):
        scores = [[source["score"] for source in item["sources"]] for item in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-7)


def test_whoever_stops_listening_stops_the_generation(tuned: tuple[Any, Any]) -> None:
    attribute = ask(*tuned)
    before, calls, closing = threading.active_count(), list[int](), threading.Event()

    def hold(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 3:  # the check of the prompt, the prompt, a token
            closing.wait(60)

    handle = attribute.model.get_base_model().transformer.register_forward_pre_hook(hold)
    stream = attribute.stream("w1", max_new_tokens=10, min_new_tokens=10)
    next(stream)
    timer = threading.Timer(0.2, closing.set)
    timer.start()
    stream.close()
    timer.join()
    handle.remove()
    assert len(calls) <= 5
    assert threading.active_count() == before
    assert "forward" not in vars(attribute.model.get_base_model())
    assert attribute("w1", max_new_tokens=2)["tokens"]  # and the model is as it was


def test_what_cannot_be_streamed_is_said(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    attribute = ask(*tuned)
    for prompt in ("", {"prompt": "w1", "completion": "w2"}):
        with pytest.raises(QueryError, match="streaming continues a prompt"):
            next(attribute.stream(prompt))
    with pytest.raises(ValueError, match=r"streamer.*beam search"):
        next(attribute.stream("w1", num_beams=2, max_new_tokens=2))
    with pytest.raises(UnsupportedError, match="plain growing key-value cache"):
        next(attribute.stream("w1", use_cache=False, max_new_tokens=2))
    with pytest.raises(UnsupportedError, match="plain growing key-value cache"):
        next(attribute.stream("w1", cache_implementation="static", max_new_tokens=2))
    assert "forward" not in vars(attribute.model.get_base_model())
    model = adapted(base())
    bank: Any = fine_tune(tmp_path, model, config(probes=3, private_rows=True)).bank
    with pytest.raises(QueryError, match="keeps sources only"):
        next(ask(model, bank).stream("w1", top_k=2))
    assert next(ask(model, bank).stream("w1", max_new_tokens=1))["sources"]


def test_models_whose_logits_or_cache_are_more_than_that_are_refused() -> None:
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6,
    )  # fmt: skip
    capped = adapted(
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.1, layer_types=["full_attention"]))
    )
    sliding = adapted(MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)))
    for model, message in ((capped, "soft capping"), (sliding, "no sliding window")):
        parameters, probes = parts(model)
        with pytest.raises(UnsupportedError, match=message):
            next(streamed(model, Decoding(model, parameters, CAUSAL_LM, probes.float()), PROMPT, SETTINGS))
    training = adapted(base()).train()
    parameters, probes = parts(training)
    with pytest.raises(UnsupportedError, match="training mode"):
        Decoding(training, parameters, CAUSAL_LM, probes)


def test_a_model_that_does_more_between_its_layers_is_refused_with_each_token() -> None:
    model = adapted(ARCHITECTURES["llama"]())
    parameters, probes = parts(model)
    decoding = written(model, parameters, probes)
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda _, inputs: (-inputs[0], *inputs[1:]))
    with pytest.raises(UnsupportedError, match="does not begin where"):
        list(streamed(model, decoding, PROMPT, SETTINGS))


def test_an_attention_that_changes_after_the_prompt_is_refused() -> None:
    model = adapted(ARCHITECTURES["llama"]())
    parameters, probes = parts(model)
    output = model.get_base_model().model.layers[1].self_attn.o_proj
    output.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (2.0 if inputs[0].shape[1] == 1 else 1.0),))
    with pytest.raises(UnsupportedError, match="self_attn computes something else"):
        list(streamed(model, written(model, parameters, probes), PROMPT, SETTINGS))


def test_infinite_derivatives_are_refused() -> None:
    model = adapted(ARCHITECTURES["gpt2"]())
    parameters, probes = parts(model)
    for way in WAYS:
        with pytest.raises(NumericalError, match="not finite"):
            list(streamed(model, way(model, parameters, probes * float("inf")), PROMPT, SETTINGS))
