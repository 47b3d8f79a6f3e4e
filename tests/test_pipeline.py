"""The attribution pipeline, as users call it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from hf_fwdattr import ResponseBank, TrainingDataAttributionPipeline
from hf_fwdattr.bank.hashing import row_hash
from hf_fwdattr.errors import BankError, MismatchError, QueryError
from hf_fwdattr.pipeline import TASK
from tests.helpers.cases import CONTEXT, adapted
from tests.helpers.reference import agree
from tests.helpers.runs import (
    ROWS,
    ask,
    base,
    config,
    fine_tune,
    oracle,
    queries,
    saved_adapter,
    tokenizer,
    training_set,
)


GREEDY: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w2 w2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "adapter"
    saved_adapter(path, config(row_id_column="number"))
    return path


@pytest.fixture
def attribute(folder: Path) -> TrainingDataAttributionPipeline:
    return pipeline(TASK, model=str(folder), device="cpu")


def same(one: Any, other: Any) -> None:
    """Assert that two results differ by rounding at most."""
    assert one["generated_text"] == other["generated_text"]
    assert one["tokens"] == other["tokens"]
    for name in ("examples", "sources"):
        assert [{**line, "score": 0, "std": 0, "token_scores": 0} for line in one[name]] == [
            {**line, "score": 0, "std": 0, "token_scores": 0} for line in other[name]
        ]
        assert [line["score"] for line in one[name]] == pytest.approx(
            [line["score"] for line in other[name]], rel=1e-5
        )


def test_prompt_is_continued_and_attributed(attribute: TrainingDataAttributionPipeline) -> None:
    result = attribute(PROMPTS[0], top_k=20, dataset=training_set(), **GREEDY)
    assert set(result) == {"generated_text", "tokens", "token_ids", "offsets", "examples", "sources"}
    words = tokenizer()(PROMPTS[0], return_tensors="pt")
    output = attribute.model.generate(**words, **GREEDY, pad_token_id=0)[0, 3:].tolist()
    assert result["token_ids"] == output
    assert result["tokens"] == [f" w{token}" for token in output]
    assert result["generated_text"] == "".join(result["tokens"])
    assert result["tokens"] == [result["generated_text"][slice(*span)] for span in result["offsets"]]
    ids = words["input_ids"][0].tolist() + output
    (line,) = attribute.scores([{"input_ids": ids, "labels": [-100] * 3 + output}])
    data = training_set()
    assert len(result["examples"]) == ROWS
    values = [example["score"] for example in result["examples"]]
    assert values == sorted(values, reverse=True)
    for example in result["examples"]:
        index = data["number"].index(example["row"])
        assert example["score"] == pytest.approx(float(line[index]), rel=1e-5)
        assert example["example"] == data[index]
        assert example["source"] == data[index]["source"]
        assert len(example["token_scores"]) == len(result["tokens"])
        assert sum(example["token_scores"]) == pytest.approx(example["score"], rel=1e-4, abs=1e-6)


def test_token_scores_equal_scores_of_single_tokens(attribute: TrainingDataAttributionPipeline) -> None:
    result = attribute({"prompt": "w3 w4", "completion": " w5 w6 w7"}, top_k=20)
    assert result["tokens"] == [" w5", " w6", " w7"]
    ids = [3, 4, 5, 6, 7]
    alone = [
        {"input_ids": ids, "labels": [token if i == position else -100 for i, token in enumerate(ids)]}
        for position in (2, 3, 4)
    ]
    lines = attribute.scores(alone)
    for example in result["examples"]:
        expected = lines[:, 100 - example["row"]]
        assert example["token_scores"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-7)


def test_no_inputs_give_no_results(attribute: TrainingDataAttributionPipeline) -> None:
    assert attribute([]) == []
    assert attribute(()) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batched_prompts_equal_single_prompts(attribute: TrainingDataAttributionPipeline, batch_size: int) -> None:
    results = attribute(PROMPTS, batch_size=batch_size, **GREEDY)
    assert len(results) == len(PROMPTS)
    for prompt, result in zip(PROMPTS, results, strict=True):
        same(attribute(prompt, **GREEDY), result)


def test_given_and_generated_outputs_share_a_batch(attribute: TrainingDataAttributionPipeline) -> None:
    given = {"prompt": "w9", "completion": " w1 w2"}
    one, other = attribute([PROMPTS[0], given], batch_size=2, **GREEDY)
    same(one, attribute(PROMPTS[0], **GREEDY))
    same(other, attribute(given))


def test_generated_output_can_be_given(attribute: TrainingDataAttributionPipeline) -> None:
    output = attribute(PROMPTS[1], **GREEDY)
    same(output, attribute({"prompt": PROMPTS[1], "completion": output["generated_text"]}))
    same(output, attribute({"prompt": PROMPTS[1]}, **GREEDY))


def test_generator_of_prompts_is_attributed(attribute: TrainingDataAttributionPipeline) -> None:
    def prompts() -> Iterator[str]:
        yield from PROMPTS[:2]

    results = list(attribute(prompts(), **GREEDY))
    assert len(results) == 2
    same(results[0], attribute(PROMPTS[0], **GREEDY))


def test_chats_use_the_template(attribute: TrainingDataAttributionPipeline) -> None:
    chat = [{"role": "user", "content": "w2 w3"}, {"role": "assistant", "content": "w4"}]
    same(attribute(chat, **GREEDY), attribute("w2 w3 w4", **GREEDY))  # the assistant's last message is continued
    one, other = attribute([chat, chat[:1]], **GREEDY)
    same(one, attribute(chat, **GREEDY))
    same(other, attribute("w2 w3 w1", **GREEDY))
    given = {"prompt": chat[:1], "completion": " w7 w8"}
    same(attribute(given), attribute({"prompt": "w2 w3 w1", "completion": " w7 w8"}))
    same(attribute({"prompt": chat[:1], "completion": chat[1:]}), attribute({"prompt": "w2 w3", "completion": " w4"}))


def test_options_at_construction_hold_for_all_calls(folder: Path) -> None:
    options: dict[str, Any] = dict(dataset=training_set(), top_k=2, budget="all")
    query = {"prompt": "w3 w4", "completion": " w5 w6"}
    expected = pipeline(TASK, model=str(folder), device="cpu")(query, **options)
    attribute = pipeline(TASK, model=str(folder), device="cpu", **options)
    assert attribute(query) == expected
    assert len(attribute(query, top_k=1)["examples"]) == 2


def test_directional_derivatives_follow_the_banks_directions(attribute: TrainingDataAttributionPipeline) -> None:
    directions = attribute.bank.directions(lines=slice(2, 5))
    by_index = attribute.scorer.directional_derivatives(queries(2), slice(2, 5))
    assert torch.equal(attribute.scorer.directional_derivatives(queries(2), directions), by_index)
    assert by_index.shape == (2, max(len(query["labels"]) for query in queries(2)) - 1, 3)


def test_top_k_counts_each_side(attribute: TrainingDataAttributionPipeline) -> None:
    query = {"prompt": "w3 w4", "completion": " w5 w6"}
    everything = [example["score"] for example in attribute(query, top_k=20)["examples"]]
    positive = sum(value > 0 for value in everything)
    assert 2 < positive < ROWS - 2
    for k in (0, 1, 2):
        scores = [example["score"] for example in attribute(query, top_k=k)["examples"]]
        assert scores == pytest.approx(everything[:k] + everything[len(everything) - k :])
    assert len(attribute(query)["examples"]) == min(5, positive) + min(5, ROWS - positive)


def test_live_model_needs_only_tokenizer_and_bank(tmp_path: Path, folder: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}-base"), folder)
    bank = ResponseBank.from_pretrained(folder)
    expected = pipeline(TASK, model=str(folder), device="cpu").scores(queries())
    for given in (bank, folder, str(folder), folder / "fwdattr"):
        attribute = pipeline(TASK, model=model, tokenizer=tokenizer(), bank=given, device="cpu")
        agree(attribute.scores(queries()), expected, 1e-6)
    with pytest.raises(BankError, match="no bank in"):
        pipeline(TASK, model=model, tokenizer=tokenizer(), bank=tmp_path, device="cpu")


def test_scores_are_additive_over_tokens_and_independent_of_the_batch(
    attribute: TrainingDataAttributionPipeline,
) -> None:
    asked = queries(5)
    whole = attribute.scores(asked, batch_size=5)
    for size in (1, 2):
        agree(attribute.scores(asked, batch_size=size), whole, 1e-5)
    query = asked[1]
    halves = [
        query | {"labels": [label if at % 2 == side else -100 for at, label in enumerate(query["labels"])]}
        for side in (0, 1)
    ]
    agree(attribute.scores(halves).sum(0), whole[1], 1e-5)


@pytest.mark.parametrize("readout", ["auto", "jvp", "difference"])
def test_scores_equal_reverse_mode(folder: Path, readout: str) -> None:
    attribute = pipeline(TASK, model=str(folder), device="cpu", readout=readout)
    agree(attribute.scores(queries()), oracle(attribute.model, attribute.bank, queries()), 1e-5)


@pytest.mark.parametrize("limit", [0, 64])
def test_source_scores_are_sums_of_row_scores(tmp_path: Path, limit: int) -> None:
    model = adapted(base())
    bank = fine_tune(tmp_path, model, config(source_directions=limit)).bank
    assert bank is not None
    assert bank.manifest.source_directions == (3 if limit else 0)
    attribute = ask(model, bank)
    sources = training_set()["source"]
    by_row = attribute.scores(queries())
    expected = torch.stack(
        [by_row[:, [i for i, s in enumerate(sources) if s == name]].sum(1) for name in bank.manifest.sources], 1
    )
    agree(attribute.source_scores(queries()), expected, 1e-5)
    result = attribute({"prompt": "w3", "completion": " w4"})
    assert [line["score"] for line in result["sources"]] == sorted(
        (s["score"] for s in result["sources"]), reverse=True
    )


class Backwards(AssertionError):
    """A backward pass was run."""


def test_no_query_runs_a_backward_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise Backwards

    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    # Every backward pass enters the engine here, those of functorch's grad and vjp included.
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", forbidden)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", forbidden)
    x = torch.ones(1, requires_grad=True)
    for attempt in (
        lambda: x.sum().backward(),
        lambda: torch.func.grad(lambda y: y.sum())(x),
        lambda: torch.func.jacrev(lambda y: y * y)(x),
    ):
        with pytest.raises(Backwards):
            attempt()
    for readout in ("auto", "jvp", "difference"):
        attribute = pipeline(TASK, model=str(folder), device="cpu", readout=readout)
        assert not any(parameter.grad is not None for parameter in attribute.model.parameters())
        with torch.enable_grad():  # nor is a graph kept, whatever mode the user is in
            result = attribute(PROMPTS[0], dataset=training_set(), **GREEDY)
            table = attribute.scores(queries())
        assert result["examples"]
        assert not table.requires_grad


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the prompt is empty"),
        ({"prompt": "w1", "completion": ""}, "the completion is empty"),
        ({"prompt": "", "completion": "w1 w2"}, "the prompt is empty .* has no probability"),
        ({"prompt_ids": [], "completion_ids": [1, 2]}, "the prompt is empty"),
        ({"prompt_ids": [1], "completion_ids": []}, "the completion is empty"),
        ({"prompt_ids": [1], "completion_ids": ["w1"]}, "not a list of whole numbers"),
        ({"prompt_ids": [1, 99]}, "the prompt has the token 99, which is not in the vocabulary"),
        ({"prompt_ids": b"ab"}, "prompt_ids are not a list of whole numbers"),
        (b"w1 w2", "cannot attribute a bytes; pass text"),
        (torch.tensor([[3, 4]]), "cannot attribute a Tensor"),
        ({"prompt": "w1", "completion": [{"role": "assistant", "content": "w2"}]}, "the prompt is text and"),
        ({"prompt": 3, "completion": "w2"}, "the prompt is a int"),
        ({"prompt": "w1", "completion": 3}, "the completion is a int"),
        ("w1 " * CONTEXT, "the prompt has 16 tokens and the model reads at most 16"),
        ("w1 " * 14, "14 tokens and 4 are to be generated"),
        ({"prompt": "w1 " * 12, "completion": " w2 " * 5}, f"17 tokens and the model reads at most {CONTEXT}"),
        (17, "cannot attribute a int"),
        ({"text": "w1"}, "a training row of 1 tokens, of which none follows another"),
        ({"words": "w1"}, "cannot attribute a dict"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "which answers nothing"),
    ],
)
def test_input_that_cannot_be_attributed_is_refused(
    attribute: TrainingDataAttributionPipeline, query: Any, message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        attribute(query, **GREEDY)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "there are no queries"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "query 0 has no supervised token"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "query 0 has no supervised token"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
        ([*queries(2), {"input_ids": [1] * 17, "labels": [1] * 17}], "query 2 has 17 tokens"),
        ([{"input_ids": [1, 2], "labels": [1, 23]}], "query 0 has the label 23"),
        ([{"input_ids": [1, 2], "labels": [1, -5]}], "query 0 has the label -5"),
        ([{"input_ids": [1, 99], "labels": [1, 2]}], "query 0 has the token 99"),
        ([{"input_ids": [1, 2]}], "query 0 has no labels"),
        ([{"input_ids": [1, 2.5], "labels": [1, 2]}], "query 0 has input_ids that are not a list of whole numbers"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}], "a 0 in its attention_mask"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [0, 1, 1]}], "a label at a token that"),
    ],
)
def test_query_that_cannot_be_scored_is_refused(
    attribute: TrainingDataAttributionPipeline, asked: Any, message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        attribute.scores(asked)


@pytest.mark.parametrize(
    ("top_k", "message"),
    [
        ("5", "top_k='5': a text is not a number. Pass top_k=5, without quotes"),
        (2.0, "top_k=2.0: a float is not a whole number. Pass top_k=2"),
        (True, "top_k=True: a truth value does not say how many"),
        (-1, "top_k=-1: the number of rows to name on either side cannot be negative"),
    ],
)
def test_top_k_that_is_no_count_is_refused(
    attribute: TrainingDataAttributionPipeline, folder: Path, top_k: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute({"prompt": "w3", "completion": " w5"}, top_k=top_k)
    with pytest.raises(ValueError, match=message):
        attribute.scorer.attribute(queries(1), top_k)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=str(folder), device="cpu", top_k=top_k)


@pytest.mark.parametrize("query", ["w1", {"prompt": "w1", "completion": " w2"}])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_token": 3}, "max_new_token=3: neither the pipeline nor generate .* Write max_new_tokens"),
        ({"topk": 3}, "topk=3: .* Write top_k"),
        ({"generate_kwargs": {"temprature": 3}}, "temprature=3: .* Write temperature"),
        ({"generate_kwargs": 3}, "generate_kwargs=3: not a dictionary"),
        ({"readout": "jvp"}, "readout='jvp': it is set when the pipeline is made"),
        ({"input_ids": [1]}, "the pipeline makes generate's inputs itself"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3': not a number of tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: not a number of tokens"),
        ({"max_length": 0}, "max_length=0: not a number of tokens"),
        ({"generate_kwargs": {"min_new_tokens": True}}, "min_new_tokens=True: not a number of tokens"),
        ({"generation_config": {"max_new_tokens": 1}}, "generation_config: a dict, which generate does not read"),
    ],
)
def test_settings_that_do_not_exist_are_refused_with_a_completion_too(
    attribute: TrainingDataAttributionPipeline, query: Any, settings: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(query, **settings)


@pytest.mark.parametrize("batch_size", [0, -1, "2", 1.5, True])
def test_batch_size_that_is_no_count_is_refused(attribute: TrainingDataAttributionPipeline, batch_size: Any) -> None:
    one: Any = queries(1)[0]
    for score in (attribute.scores, attribute.source_scores):
        with pytest.raises(ValueError, match=f"batch_size={batch_size!r}: not a number of queries"):
            score(queries(2), batch_size)
        with pytest.raises(QueryError, match=r"one query, not a list of them\. Pass \[query\]"):
            score(one)


def test_bank_that_is_none_is_refused(attribute: TrainingDataAttributionPipeline) -> None:
    with pytest.raises(ValueError, match=r"bank=3: a int\. Pass a folder"):
        ask(attribute.model, 3)


def test_generate_has_a_top_k_of_its_own(attribute: TrainingDataAttributionPipeline, folder: Path) -> None:
    expected = attribute("w4 w5", top_k=1, **GREEDY)
    settings = {"top_k": 1, "do_sample": True, "max_new_tokens": 4}  # the likeliest token always
    same(attribute("w4 w5", top_k=1, generate_kwargs=settings), expected)
    constructed = pipeline(TASK, model=str(folder), device="cpu", top_k=1, generate_kwargs=settings)
    for _ in range(3):
        same(constructed("w4 w5"), expected)


def test_output_beyond_the_context_is_refused_before_it_is_generated(
    attribute: TrainingDataAttributionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "w1 " * 14
    assert len(attribute(prompt, do_sample=False, eos_token_id=-1)["tokens"]) == 2  # the default is cut to the room
    config = GenerationConfig(max_new_tokens=3)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(attribute.model, "generate", forbidden)
    for settings in ({"max_new_tokens": 3}, {"max_length": 17}, {"generation_config": config}):
        for asked in (prompt, [*PROMPTS[:1], prompt], {"prompt_ids": [1] * 14}, [{"role": "user", "content": prompt}]):
            with pytest.raises(QueryError, match=r"are to be generated: .* the model reads at most 16"):
                attribute(asked, batch_size=2, **settings)


def test_token_ids_equal_their_text(attribute: TrainingDataAttributionPipeline) -> None:
    expected = attribute({"prompt": "w3 w4", "completion": " w5 w6"}, top_k=2)
    assert expected["token_ids"] == [5, 6]
    for asked in (
        {"prompt_ids": [3, 4], "completion_ids": [5, 6]},
        {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
        {"input_ids": torch.tensor([0, 3, 4, 5, 6]), "labels": [-100] * 3 + [5, 6], "attention_mask": [0, 1, 1, 1, 1]},
        training_set()[0] | {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    ):
        assert attribute(asked, top_k=2) == expected
    same(attribute([3, 4], **GREEDY), attribute("w3 w4", **GREEDY))
    results = attribute([[3, 4], [3]], **GREEDY)
    same(results[0], attribute("w3 w4", **GREEDY))
    same(results[1], attribute("w3", **GREEDY))


def test_padding_of_token_lists_is_left_out(attribute: TrainingDataAttributionPipeline) -> None:
    asked = queries(4)
    width = max(len(query["input_ids"]) for query in asked)
    for left in (True, False):
        batch = []
        for query in asked:
            pad = width - len(query["input_ids"])
            line = {"input_ids": [0] * pad, "labels": [-100] * pad, "attention_mask": [0] * pad}
            full = query | {"attention_mask": [1] * len(query["input_ids"])}
            batch.append({name: line[name] + full[name] if left else full[name] + line[name] for name in line})
        assert torch.equal(attribute.scores(batch), attribute.scores(asked))
        assert torch.equal(attribute.source_scores(batch), attribute.source_scores(asked))


def test_impossible_options_are_refused(attribute: TrainingDataAttributionPipeline, folder: Path) -> None:
    with pytest.raises(QueryError, match="num_return_sequences is more than one"):
        attribute("w1", num_return_sequences=2, do_sample=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="readout='reverse': one of auto, jvp, difference"):
        pipeline(TASK, model=str(folder), device="cpu", readout="reverse")


def test_bank_of_other_weights_is_refused(tmp_path: Path, folder: Path) -> None:
    other = adapted(base())
    fine_tune(tmp_path, other, learning_rate=2e-2)
    other.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="belongs to weights with sha256"):
        pipeline(TASK, model=other, tokenizer=tokenizer(), bank=folder, device="cpu")


def changed(data: Dataset, row: int, **values: Any) -> Dataset:
    rows = data.to_list()
    rows[row] |= values
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (training_set(ROWS - 1), MismatchError, "the bank has 12 rows and the dataset 11"),
        (Dataset.from_list([]), MismatchError, "the bank has 12 rows and the dataset 0"),
        (training_set().select(range(ROWS - 1, -1, -1)), MismatchError, "row 0 of the dataset is not the row"),
        (
            changed(training_set(), 7, input_ids=[1, 2]),
            MismatchError,
            r"row 7 of the dataset .*token hash [0-9a-f]{32}, bank",
        ),
        (training_set().remove_columns(["input_ids", "text"]), QueryError, "no 'input_ids'"),
        (training_set().remove_columns(["input_ids", "text"]).to_list(), QueryError, "no 'input_ids'"),
    ],
    ids=["fewer", "empty", "reversed", "one differs", "no tokens", "a list without tokens"],
)
def test_other_dataset_is_refused(
    attribute: TrainingDataAttributionPipeline, data: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attribute(PROMPTS[0], dataset=data, **GREEDY)


def test_dataset_is_verified_once_and_a_list_every_time(
    attribute: TrainingDataAttributionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = {"prompt": "w3 w4", "completion": " w5 w6"}
    hashed: list[int] = []

    def counted(*given: Any) -> bytes:
        hashed.append(1)
        return row_hash(*given)

    monkeypatch.setattr("hf_fwdattr.bank.hashing.row_hash", counted)
    data = training_set()
    for _ in range(3):
        attribute(query, dataset=data)
    assert len(hashed) == ROWS
    rows = data.to_list()
    attribute(query, dataset=rows)
    rows[0]["input_ids"] = [9, 9]
    with pytest.raises(MismatchError, match="row 0"):
        attribute(query, dataset=rows)
    attribute(query, dataset=rows, verify_dataset=False)


def test_verification_reads_tokens_only(attribute: TrainingDataAttributionPipeline) -> None:
    """Only the rows that are shown are read whole."""
    data = training_set()
    shown: list[Any] = []

    def look(rows: dict[str, Any]) -> dict[str, Any]:
        shown.append(len(rows["input_ids"]))
        return rows

    lazy = data.with_transform(look)
    attribute({"prompt": "w3 w4", "completion": " w5 w6"}, dataset=lazy, top_k=1)
    assert shown == [1, 1]


def test_padded_rows_are_recognized(attribute: TrainingDataAttributionPipeline) -> None:
    rows = training_set().to_list()
    for row in rows:
        pad = CONTEXT - len(row["input_ids"])
        row["attention_mask"] = [0] * pad + [1] * len(row["input_ids"])
        row["input_ids"] = [0] * pad + row["input_ids"]
    for data in (rows, Dataset.from_list(rows), Dataset.from_list(rows).with_format("torch")):
        assert attribute({"prompt": "w3", "completion": " w5"}, dataset=data)["examples"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapter_matches_its_bank(tmp_path: Path, dtype: torch.dtype) -> None:
    """A base in either dtype, an adapter in float32 on it, as peft trains it."""
    raw = base(dtype)
    raw.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert loaded.dtype == dtype
    model = get_peft_model(loaded, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    fine_tune(tmp_path / "run", model)
    model.save_pretrained(tmp_path / "run")
    tokenizer().save_pretrained(tmp_path / "run")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    attribute = pipeline(TASK, model=str(tmp_path / "run"), device="cpu")
    assert attribute.model.dtype == dtype
    agree(attribute.scores(queries()), ask(model, tmp_path / "run").scores(queries()), 1e-5)
