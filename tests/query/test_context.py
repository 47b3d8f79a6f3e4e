"""Beyond the context: refused before anything is generated where positions are a table, free where they are rotary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XGLMConfig,
    XGLMForCausalLM,
)

from hf_fwdattr.errors import QueryError
from hf_fwdattr.models.positions import context_length
from hf_fwdattr.query.classifier_inputs import classifier_batch
from hf_fwdattr.query.inputs import check_queries
from tests.helpers.cases import CONTEXT, VOCABULARY, adapted, gpt2, llama
from tests.helpers.runs import ask, config, fine_tune, training_set


LONG = " ".join(f"w{1 + i % 20}" for i in range(CONTEXT + 4))
IDS = [1 + i % 20 for i in range(CONTEXT + 4)]
ROW = {"input_ids": IDS, "labels": [-100] * CONTEXT + IDS[CONTEXT:]}


def asked(folder: Path, model: Any) -> Any:
    bank = fine_tune(folder, model, config(directions=3), training_set()).bank
    return ask(model.eval(), bank)


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own, of prompts beyond the config's length
def test_rotary_model_is_asked_beyond_its_configs_length(tmp_path: Path) -> None:
    attribute = asked(tmp_path, adapted(llama()))
    assert attribute.model.config.max_position_embeddings == CONTEXT
    expected = attribute.model.generate(torch.tensor([IDS]), max_new_tokens=3, do_sample=False)[0, len(IDS) :]
    for settings in ({"max_new_tokens": 3}, {"max_length": len(IDS) + 3}):
        result = attribute(LONG, do_sample=False, top_k=2, **settings)
        assert result["token_ids"] == expected.tolist()
        assert result["examples"]
    assert len(attribute(LONG, do_sample=False, eos_token_id=-1)["tokens"]) == 20  # the default is not cut either
    given = attribute({"prompt": LONG, "completion": " w3 w4"}, top_k=99)
    row = {"input_ids": [*IDS, 3, 4], "labels": [-100] * len(IDS) + [3, 4]}
    (scores,) = attribute.scores([row])
    assert [line["score"] for line in given["examples"]] == pytest.approx(
        scores.sort(descending=True).values.tolist(), rel=1e-4
    )


def test_table_of_positions_is_never_read_beyond_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute = asked(tmp_path, adapted(gpt2()))

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(attribute.model, "generate", forbidden)
    inputs = [
        LONG,
        {"prompt_ids": IDS},
        [{"role": "user", "content": LONG}],
        ROW,
        {"prompt": LONG, "completion": " w1"},
    ]
    for given in inputs:
        with pytest.raises(QueryError, match="the model reads at most 16"):
            attribute(given)
    for score in (attribute.scores, attribute.source_scores):
        with pytest.raises(QueryError, match="query 0 has 20 tokens and the model reads at most 16"):
            score([ROW])


@pytest.mark.parametrize("kind", ["BERT", "RoBERTa"])
def test_classifiers_read_as_many_tokens_as_their_table_has_lines_for(kind: str) -> None:
    """RoBERTa's first lines, up to the padding's, are read by no token."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model: Any = (
        BertForSequenceClassification(BertConfig(max_position_embeddings=CONTEXT, **sizes))
        if kind == "BERT"
        else RobertaForSequenceClassification(
            RobertaConfig(max_position_embeddings=CONTEXT + 2, pad_token_id=1, **sizes)
        )
    )
    assert context_length(model) == CONTEXT
    model.eval()(input_ids=torch.full((1, CONTEXT), 5))
    with pytest.raises(QueryError, match="a query has 17 tokens and the model reads at most 16"):
        classifier_batch([{"input_ids": [5] * 17, "labels": [1]}], model, torch.device("cpu"))


_SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=CONTEXT)
TABLES: dict[str, Any] = {
    "learned": lambda: gpt2(torch.float32),
    "learned, after two lines": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=CONTEXT,
        )
    ),
    "learned, of another name": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**_SIZES)),
    "fixed": lambda: GPTJForCausalLM(GPTJConfig(**_SIZES, rotary_dim=4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_limit_is_where_a_models_table_ends(kind: str) -> None:
    model = TABLES[kind]().eval()
    assert context_length(model) == CONTEXT
    model(input_ids=torch.full((1, CONTEXT), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, CONTEXT + 1), 5))


def test_growing_and_rotary_positions_have_no_limit() -> None:
    sizes = dict(vocab_size=VOCABULARY, d_model=8, ffn_dim=8, num_layers=1, attention_heads=2)
    growing = XGLMForCausalLM(XGLMConfig(max_position_embeddings=CONTEXT, **sizes))
    for model in (growing, llama(torch.float32)):
        assert context_length(model) is None
        model.eval()(input_ids=torch.full((1, 3 * CONTEXT), 5))


def test_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(QueryError, match="the token 99, which is not in the vocabulary"):
        check_queries([ROW | {"input_ids": [99] * len(IDS)}], llama())


def test_row_longer_than_a_rotary_models_config_is_trained_and_asked(tmp_path: Path) -> None:
    rows = [row | {"input_ids": IDS, "labels": IDS} if i == 3 else row for i, row in enumerate(training_set())]
    model = adapted(llama())
    bank = fine_tune(tmp_path, model, config(), Dataset.from_list(rows)).bank
    result = ask(model.eval(), bank)(rows[3], top_k=1, dataset=rows)
    assert result["token_ids"] == IDS[1:]
    assert result["examples"][0]["row"] == 3
