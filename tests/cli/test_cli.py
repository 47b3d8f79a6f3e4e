"""The command line, run as by a user."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, default_data_collator
from typer.testing import CliRunner, Result

from hf_fwdattr.cli.app import app
from hf_fwdattr.trainer.callback import RECORD
from tests.helpers.cases import adapted
from tests.helpers.interpreter import COMMAND, fresh
from tests.helpers.runs import ROWS, config, fine_tune, saved_adapter, saved_base, tokenizer, training_set
from tests.query.test_classifiers import classifier
from tests.query.test_loading import ROWS as LABELLED


SETTINGS = {"horizon": {"steps": 50, "step_size": 0.05}, "source_column": "source", "directions": 6, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with its bank; beside it the training set, tokenized and as text."""
    path = tmp_path_factory.mktemp("saved") / "adapter"
    saved_adapter(path, config(row_id_column="number"))
    training_set().save_to_disk(path.parent / "tokenized")
    training_set().select_columns(["text", "source"]).to_json(path.parent / "text.jsonl")
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")


def call(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def attributed(folder: Path, *more: Any) -> Result:
    return call("attribute", folder, "w3 w4", "--completion", " w5 w6", *more)


def test_attribute_prints_rows_and_sources(folder: Path) -> None:
    result = attributed(folder, "--dataset", folder.parent / "tokenized", "--top-k", 2)
    assert result.exit_code == 0, result.output
    values = json.loads(attributed(folder, "--top-k", 2, "--json").stdout)
    data = training_set()
    for example in values["examples"]:
        row = data[data["number"].index(example["row"])]
        line = next(line for line in result.stdout.splitlines() if f" {example['row']} " in line)
        assert f"{example['score']:+.4f}" in line
        assert row["text"] in line
        assert (row["source"] or "") in line
    for source in values["sources"]:
        assert re.search(rf"{re.escape(format(source['score'], '+.4f'))}\W+{source['source']}", result.stdout)


def test_attribute_prints_only_json(folder: Path) -> None:
    result = attributed(folder, "--json", "--dataset", folder.parent / "tokenized", "--top-k", 3)
    values = json.loads(result.stdout)
    assert set(values) == {"generated_text", "tokens", "token_ids", "offsets", "examples", "sources"}
    assert values["generated_text"] == " w5 w6"
    assert all(len(example["token_scores"]) == 2 for example in values["examples"])
    assert values["examples"][0]["example"]["text"].startswith("w")


def test_attribute_accepts_a_budget_or_refuses_it(folder: Path) -> None:
    results = [json.loads(attributed(folder, "--json", "--budget", budget).stdout) for budget in ("all", "60")]
    named = [[example["row"] for example in result["examples"]] for result in results]
    assert named[0] == named[1] != []
    for wrong, message in (("0", "--budget 0"), ("-3", "--budget -3"), ("some", "--budget some")):
        result = attributed(folder, "--budget", wrong)
        assert result.exit_code == 1
        assert message in result.stderr


def test_attribute_generates_without_a_completion(folder: Path) -> None:
    result = call("attribute", folder, "w3 w4", "--max-new-tokens", 3, "--json", "--readout", "difference")
    assert result.exit_code == 0, result.output
    assert 1 <= len(json.loads(result.stdout)["tokens"]) <= 3


def test_build_writes_a_bank_for_attribute(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    given = ("--config", tmp_path / "config.json", "--output", tmp_path, "--quiet")
    result = call("build", folder, folder.parent / "text.jsonl", *given)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {tmp_path / 'fwdattr'}\n"
    assert result.stderr == ""
    values = json.loads(call("inspect", tmp_path, "--json").stdout)
    assert (values["dataset"]["rows"], values["directions"], values["sources"]) == (
        ROWS,
        6,
        ["east", "north", "south"],
    )
    result = attributed(folder, "--bank", tmp_path, "--dataset", folder.parent / "text.jsonl", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["examples"]


def test_build_from_a_record_equals_the_callbacks_bank(tmp_path: Path) -> None:
    model = adapted(saved_base(tmp_path / "base"))
    tokenizer().save_pretrained(tmp_path / "base")
    data = training_set().remove_columns(["labels"])
    data = data.add_column("labels", data["input_ids"])
    fine_tune(tmp_path / "run", model, config(capture="after"), data, save_strategy="steps", save_steps=12)
    checkpoint = tmp_path / "run" / "checkpoint-12"
    tokenizer().save_pretrained(checkpoint)
    data.save_to_disk(tmp_path / "rows")
    result = call("build", checkpoint, tmp_path / "rows", "--record", checkpoint / RECORD, "--quiet")
    assert result.exit_code == 0, result.output
    one, other = (attributed(checkpoint, "--bank", place, "--json") for place in (tmp_path / "run", checkpoint))
    one, other = json.loads(one.stdout)["examples"], json.loads(other.stdout)["examples"]
    assert [line["row"] for line in one] == [line["row"] for line in other]
    assert [line["score"] for line in one] == pytest.approx([line["score"] for line in other], rel=1e-4)


def test_quiet_hides_progress(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    words = ("build", folder, folder.parent / "tokenized", "--config", tmp_path / "config.json", "--output", tmp_path)
    loud, quiet = call(*words), call(*words, "--quiet")
    assert (loud.exit_code, quiet.exit_code) == (0, 0)
    for title in ("curvature 1/1", "responses 1/1", "gradients at the end", "row hashes"):
        assert title in loud.stderr
    assert quiet.stderr == ""


def test_bars_of_other_libraries_are_hidden_unless_verbose(folder: Path) -> None:
    assert attributed(folder, "--quiet").stderr == ""
    assert "Loading weights" in attributed(folder, "--verbose").stderr


def test_inspect_shows_the_contents_of_a_bank(folder: Path) -> None:
    table = call("inspect", folder)
    assert table.exit_code == 0
    for words in ("response bank, verified", "12 (exact) + 3 for sources", "adamw", "12 from a local dataset"):
        assert words in table.stdout
    assert "explains" in table.stdout
    values = json.loads(call("inspect", folder / "fwdattr", "--json").stdout)
    assert values["schema_version"] == 2
    assert values["weights"] in table.stdout


def test_inspect_imports_no_torch(folder: Path) -> None:
    result = fresh(COMMAND, ["inspect", folder])
    assert "response bank, verified" in result.stdout, result.stderr
    assert result.stdout.endswith("[]\n")


def test_user_errors_are_one_message_without_traceback(tmp_path: Path, folder: Path) -> None:
    text = folder.parent / "text.jsonl"
    configs = {
        "bad": "{",
        "unknown": '{"direction": 3}',
        "range": '{"directions": -1}',
        "kind": '{"segments": "3"}',
        "list": "[]",
    }
    for name, settings in configs.items():
        (tmp_path / f"{name}.json").write_text(settings)
    latin = {".jsonl": b'{"text": "caf\xe9"}\n', ".txt": b"caf\xe9\n", ".csv": b"text\ncaf\xe9\n"}
    for kind, content in latin.items():
        (tmp_path / f"bytes{kind}").write_bytes(content)
    (tmp_path / "table.xls").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "ragged.csv").write_text("text,source\nw1,a\nw2,b,c\n")
    (tmp_path / "damaged" / "fwdattr").mkdir(parents=True)
    (tmp_path / "damaged" / "fwdattr" / "bank.json").write_text("{")
    mistakes: list[tuple[tuple[Any, ...], str]] = [
        (("inspect", tmp_path), "no bank in"),
        (("attribute", folder, "w3", "--dataset", tmp_path / "empty.jsonl"), "empty.jsonl: the file is empty"),
        (("attribute", folder, "w3", "--dataset", tmp_path / "ragged.csv"), "Expected 2 fields in line 3, saw 3)"),
        (("attribute", folder, "w3", "--dataset", ""), "--dataset: an empty name"),
        (("attribute", "", "w3"), "MODEL: an empty name"),
        (("attribute", folder, "w3", "--revision", "v9"), "which has no revisions. Leave the option out"),
        (
            ("attribute", folder, "w3", "--quiet", "--max-new-tokens", "0"),
            "--max-new-tokens 0: not a number of tokens",
        ),
        (("build", folder, text, "--config", tmp_path), "It cannot be read (Is a directory)"),
        (("inspect", tmp_path / "damaged"), "is not sound JSON"),
        (("build", folder, text), "neither a record nor a horizon was given"),
        (("build", folder, text, "--config", tmp_path / "bad.json"), "It is not sound JSON in UTF-8"),
        (("build", folder, text, "--config", tmp_path / "unknown.json"), "unknown setting(s) direction"),
        (("build", folder, text, "--config", tmp_path / "range.json"), "directions=-1: "),
        (("build", folder, text, "--config", tmp_path / "kind.json"), "segments='3'"),
        (("build", folder, text, "--config", tmp_path / "none.json"), "none.json"),
        (("build", folder, tmp_path / "table.xls"), "cannot read"),
        *[(("build", folder, tmp_path / f"bytes{kind}"), "in UTF-8") for kind in latin],
        (("build", folder, text, "--text-column", "body"), "neither 'input_ids' nor 'body'"),
        (("build", "nobody/nothing", text), "is no local folder to put the bank into; say --output"),
        (("build", folder, text, "--record", tmp_path), "no record of a run in"),
        (("attribute", folder, "w3", "--quiet", "--completion", ""), "the completion is empty"),
        (("attribute", folder, "w3", "--readout", "reverse"), "one of auto, jvp, difference"),
        (("attribute", folder, "w3", "--bank", tmp_path), "no bank in"),
        (("attribute", folder, "w3", "--quiet", "--top-k", "-1"), "--top-k -1"),
        (("attribute", tmp_path / "damaged", "w3"), "holds a bank and no model. Name the model, and the bank by"),
        (("attribute", tmp_path, "w3"), "holds neither config.json nor adapter_config.json"),
        (("attribute", tmp_path / "nowhere", "w3"), "there is no such folder"),
        (("attribute", folder, "w3", "--temperature", "0.5"), "--temperature: 0.5. It is for sampling alone"),
        (("attribute", folder, "w3", "--do-sample", "--temperature", "0"), "It must be above 0"),
        (("attribute", folder, "w3", "--completion", " w4", "--seed", "1"), "none is sampled"),
        (("attribute", folder, "w3", "--allow-mismatch", "rows"), "--allow-mismatch: rows. It can be weights"),
        (("attribute", folder, "w3", "--seed", "-1"), "--seed: -1"),
        (("attribute", folder, "w3", "--dataset", text, "--split", "test"), "--split: test"),
        (("attribute", folder, "w3", "--dataset", folder.parent / "tokenized", "--split", "test"), "without splits"),
        (("attribute", folder, "caf\udce9"), "Its bytes are not UTF-8"),
        (("build", folder, text, "--config", tmp_path / "list.json"), "It holds no JSON object"),
    ]
    for words, message in mistakes:
        result = call(*words)
        assert result.exit_code == 1, (words, result.output)
        assert isinstance(result.exception, SystemExit), (words, result.exception)
        lines = result.stderr.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, (words, result.stderr)
        assert message in result.stderr, (words, result.stderr)
        assert "Traceback" not in result.output
        assert "allow_mismatch" not in result.output
        assert result.stdout == ""


def test_help_is_shown_without_a_command_and_by_both_options() -> None:
    result = call()
    for command in ("demo", "build", "attribute", "inspect"):
        assert command in result.stdout
    for command in ("build", "attribute", "inspect", "demo"):
        assert call(command, "--help").exit_code == call(command, "-h").exit_code == 0


def test_wrong_directions_are_refused_before_training(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--directions", "many", "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: directions='many': ")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_tokenizer_files_has_its_bases(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for file in [*bare.glob("token*"), *bare.glob("*.jinja"), *bare.glob("special*")]:
        file.unlink()
    result = attributed(bare, "--json", "--quiet", "--top-k", 1)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["generated_text"].split() == ["w5", "w6"]


def test_another_dataset_is_refused_unless_allowed(folder: Path, tmp_path: Path) -> None:
    training_set().select(range(ROWS - 1, -1, -1)).save_to_disk(tmp_path / "reversed")
    given = ("--dataset", tmp_path / "reversed", "--top-k", 1, "--quiet")
    result = attributed(folder, *given)
    assert result.exit_code == 1
    assert "row 0 of the dataset" in result.stderr
    for option in (["--no-verify"], ["--allow-mismatch", "dataset"]):
        assert attributed(folder, *given, *option).exit_code == 0


def test_sampling_repeats_with_its_seed(folder: Path) -> None:
    words = ("attribute", folder, "w3 w4", "--no-chat", "--max-new-tokens", 4, "--json", "--quiet", "--do-sample")
    one, same = (call(*words, "--temperature", 5, "--seed", 7) for _ in range(2))
    assert one.exit_code == 0, one.output
    assert one.stdout == same.stdout


def test_the_chat_template_is_used_and_said(folder: Path) -> None:
    words = ("attribute", folder, "w3", "--max-new-tokens", 1, "--json")
    chat, bare = (call(*words, way) for way in ("--chat", "--no-chat"))
    assert "asked through the chat template" in chat.stderr
    assert "asked without the chat template" in bare.stderr
    assert json.loads(chat.stdout)["examples"] != json.loads(bare.stdout)["examples"]


def test_training_set_is_given_as_its_owner_has_it(tmp_path: Path) -> None:
    """A bank of chats: the file with the messages is compared as the template renders them, and shown."""
    rows = [
        {"messages": [{"role": "user", "content": f"w{i} w2"}, {"role": "assistant", "content": f"w{i + 1}"}], "n": i}
        for i in range(3, 11)
    ]
    ids = [tokenizer().apply_chat_template(row["messages"], return_dict=True)["input_ids"] for row in rows]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    saved_adapter(tmp_path / "adapter", config(source_column=None), dataset=data)
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = attributed(tmp_path / "adapter", "--dataset", tmp_path / "chats.jsonl", "--top-k", 8, "--json")
    assert asked.exit_code == 0, asked.output
    assert "as the rows are chats" in asked.stderr
    for line in json.loads(asked.stdout)["examples"]:
        assert line["example"] == rows[line["row"]]
    table = attributed(tmp_path / "adapter", "--dataset", tmp_path / "chats.jsonl", "--top-k", 8).stdout
    assert "w3 w2 | w4" in table
    Dataset.from_list(rows).remove_columns("messages").to_json(tmp_path / "numbers.jsonl")
    asked = attributed(tmp_path / "adapter", "--dataset", tmp_path / "numbers.jsonl")
    assert asked.exit_code == 1
    assert "has the columns n: neither 'input_ids' nor texts nor messages" in asked.stderr


def test_a_classifier_is_asked_about_a_text_and_a_label(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="SEQ_CLS")
    model, data = get_peft_model(model, settings), Dataset.from_list(LABELLED)
    fine_tune(tmp_path / "run", model, config(), data, collate=default_data_collator)
    model.save_pretrained(tmp_path / "run")
    words = ("attribute", tmp_path / "run", "w3 w7", "--json", "--quiet")
    results = [json.loads(call(*words, *more).stdout) for more in ((), ("--completion", "good"), ("--completion", 1))]
    assert results[0]["label"] in ("bad", "good", "mixed")
    assert results[1] == results[2]
    assert results[1]["label"] == "good"
    assert results[1]["examples"]
    assert "good" in call("attribute", tmp_path / "run", "w3 w7", "--completion", "good").stdout
    for more, message in (
        (("--completion", "great"), "the model has no such label. Its 3 are bad, good, mixed"),
        (("--chat",), "--chat: the model is a classifier"),
        (("--do-sample",), "do_sample: no option of a classifier"),
    ):
        result = call(*words, *more)
        assert result.exit_code == 1
        assert message in result.stderr
