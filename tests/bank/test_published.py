"""A pushed fine-tune, opened by name from an empty cache, gives the same scores bit for bit."""

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, Trainer, pipeline

from hf_fwdattr import ResponseBank, ResponseCallback
from hf_fwdattr.errors import BankError, MismatchError
from hf_fwdattr.pipeline import TASK
from hf_fwdattr.query.loading import AutoModelForAttribution
from tests.helpers.cases import adapted, padded
from tests.helpers.hub_server import HUB
from tests.helpers.hub_world import World
from tests.helpers.runs import arguments, base, config, queries, tokenizer, training_set


BASE, NAME = "me/base", "me/adapter"
QUERY = {"prompt": "w3 w4", "completion": " w5 w6"}


def trained(folder: Path, **changes: Any) -> Trainer:
    """Fine-tune a base model that is on the Hub; nothing is pushed unless `changes` ask for it."""
    if ("model", BASE) not in HUB.repos:
        base(torch.float32).push_to_hub(BASE)
    model = adapted(AutoModelForCausalLM.from_pretrained(BASE))
    settings = arguments(folder, hub_model_id=NAME, **changes)
    trainer = Trainer(
        model=model, args=settings, train_dataset=training_set(), data_collator=padded,
        processing_class=tokenizer(), callbacks=[ResponseCallback(config())],
    )  # fmt: skip
    trainer.train()
    return trainer


def live_scores(trainer: Trainer) -> torch.Tensor:
    model, bank = trainer.model, ResponseBank.from_pretrained(trainer.args.output_dir)
    return pipeline(TASK, model=model, tokenizer=tokenizer(), bank=bank, device="cpu").scores(queries())


def named(**changes: Any) -> Any:
    return pipeline(TASK, model=NAME, device="cpu", **changes)


def test_scores_from_a_clean_cache_are_the_same_bit_for_bit(hub: World, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    before = live_scores(trainer)
    trainer.push_to_hub()
    shutil.rmtree(tmp_path / "run")
    hub.clean()
    attribute = named()
    assert torch.equal(attribute.scores(queries()), before)
    answer = attribute(QUERY, dataset=training_set(), top_k=3)
    assert len(answer["examples"]) == 6
    assert [source["source"] for source in answer["sources"]]
    hub.offline()
    assert torch.equal(named().scores(queries()), before)


def test_query_downloads_only_the_shards_it_needs(hub: World, tmp_path: Path) -> None:
    trained(tmp_path / "run").push_to_hub()
    hub.clean()
    attribute = named()
    assert HUB.sent("fwdattr/.*safetensors") == 0
    files = attribute.bank.manifest.files
    sources = attribute(QUERY, top_k=0)["sources"]
    theirs = next(file for file in files if file.kind == "directions" and file.first)
    assert HUB.sent("fwdattr/.*safetensors") == theirs.size
    whole = attribute(QUERY)
    assert [line["source"] for line in whole["sources"]] == [line["source"] for line in sources]
    assert [line["score"] for line in whole["sources"]] == pytest.approx([line["score"] for line in sources], rel=1e-5)
    needed = sum(
        file.size for file in files if file.kind != "error_projections"
    )  # all directions are read, so the gradient predictor is not needed
    assert HUB.sent("fwdattr/.*safetensors") == needed
    attribute(QUERY)
    assert HUB.sent("fwdattr/.*safetensors") == needed
    attribute(QUERY, budget=3)
    assert HUB.sent("fwdattr/.*safetensors") == sum(file.size for file in files)


def test_adapter_revision_that_its_base_model_lacks(hub: World, tmp_path: Path) -> None:
    """`pipeline(..., revision=)` asks the base model for the adapter's tag too, so the adapter is loaded first."""
    trainer = trained(tmp_path / "run")
    before = live_scores(trainer)
    trainer.push_to_hub()
    HfApi().create_tag(NAME, tag="v1")
    shutil.rmtree(tmp_path / "run")
    trained(tmp_path / "run", learning_rate=2e-2).push_to_hub()
    hub.clean()
    with pytest.raises(Exception, match="v1"):
        named(revision="v1")
    model = AutoModelForAttribution.from_pretrained(NAME, revision="v1")
    attribute = pipeline(TASK, model=model, tokenizer=model.attribution_tokenizer, device="cpu")
    assert torch.equal(attribute.scores(queries()), before)
    HfApi().create_tag(BASE, tag="v1")
    assert torch.equal(named(revision="v1").scores(queries()), before)


def test_everything_is_read_at_one_commit(hub: World, tmp_path: Path) -> None:
    """Base, adapter and bank change after the push; the base model of the bank is still the one that loads."""
    trainer = trained(tmp_path / "run")
    before = live_scores(trainer)
    trainer.push_to_hub()
    assert ResponseBank.from_pretrained(NAME).manifest.revision == HUB.repo(BASE).refs["main"]
    other = base(torch.float32)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(1.1)
    other.push_to_hub(BASE)
    hub.clean()
    assert torch.equal(named().scores(queries()), before)
    first = HUB.repo(NAME).refs["main"]
    shutil.rmtree(tmp_path / "run")
    trained(tmp_path / "run", learning_rate=2e-2).push_to_hub()
    bank = ResponseBank.from_pretrained(NAME, revision=first)
    with pytest.raises(MismatchError, match=r"the bank belongs to weights with sha256 .* and the model's"):
        named(bank=bank)
    assert named(bank=bank, allow_mismatch=["weights"]).scores(queries()).shape == (4, 12)


def test_card_keeps_its_section_through_every_push(hub: World, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    for _ in range(2):
        trainer.push_to_hub()
        card = ModelCard.load(NAME)
        assert "fwdattr" in card.data.tags
        assert card.text.count("## Response bank") == 1
        assert "12 rows" in card.text
        assert f'model="{NAME}"' in card.text
        assert "Training procedure" in card.text
    ResponseBank.from_pretrained(tmp_path / "run").push_to_hub(NAME)
    assert ModelCard.load(NAME).text.count("## Response bank") == 1


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_trainer_pushes_carry_the_bank(hub: World, tmp_path: Path, strategy: str) -> None:
    trainer = trained(
        tmp_path / "run", push_to_hub=True, hub_strategy=strategy, save_strategy="steps", save_steps=5,
        hub_token=None,
    )  # fmt: skip
    if strategy == "end":
        assert "fwdattr/bank.json" not in HUB.files(NAME)
        trainer.save_model()
    assert torch.equal(named().scores(queries()), live_scores(trainer))
    assert "fwdattr" in ModelCard.load(NAME).data.tags
    assert not [path for path in HUB.files(NAME) if path.startswith("_")]
    trainer.train()  # another bank in the place of the first
    if strategy == "end":
        trainer.save_model()
    assert torch.equal(named().scores(queries()), live_scores(trainer))
    assert one_bank(NAME) == {path for path in HUB.files(NAME) if path.startswith("fwdattr/")}


def test_trainer_push_leaves_one_bank(hub: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trainer only adds files; the shards of the bank before are deleted, and nothing else is."""
    trained(tmp_path / "run").push_to_hub()
    HUB.put(NAME, {"fwdattr/notes.txt": b"mine", "directions-0123abcd-00000.safetensors": b"not in the folder"})
    old = {path for path in HUB.files(NAME) if path.startswith("fwdattr/") and path.endswith(".safetensors")}
    trainer = trained(tmp_path / "run", learning_rate=2e-2)
    before = live_scores(trainer)
    trainer.push_to_hub(blocking=False).result()

    for _ in range(500):  # the shards go after the push that was waited for
        if not old & set(HUB.files(NAME)):
            break
        threading.Event().wait(0.02)
    assert one_bank(NAME) | {"fwdattr/notes.txt"} == {p for p in HUB.files(NAME) if p.startswith("fwdattr/")}
    assert "directions-0123abcd-00000.safetensors" in HUB.files(NAME)
    hub.clean()
    assert torch.equal(named().scores(queries()), before)
    HUB.put(NAME, dict.fromkeys(old, b"back"))

    def faster(repo: Any) -> None:
        HUB.before_commit = lambda repo: None
        HUB.put(NAME, {"theirs.txt": b"theirs"})

    HUB.before_commit = faster  # nothing is left to upload: the first commit is the one that deletes
    with caplog.at_level(logging.WARNING):
        trainer.push_to_hub()
    assert "shards of an older response bank are still on the Hub: me/adapter changed" in caplog.text
    assert named().bank.manifest == ResponseBank.from_pretrained(tmp_path / "run").manifest
    trainer.push_to_hub()
    assert one_bank(NAME) | {"fwdattr/notes.txt"} == {p for p in HUB.files(NAME) if p.startswith("fwdattr/")}


def one_bank(name: str) -> set[str]:
    manifest = json.loads(HUB.files(name)["fwdattr/bank.json"])
    return {"fwdattr/bank.json", *(f"fwdattr/{file['name']}" for file in manifest["files"])}


def test_failing_push_keeps_the_trained_bank(hub: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fault(method: str, path: str) -> str | None:
        return "drop" if "/commit/" in path and list((tmp_path / "run").glob("fwdattr/bank.json")) else None

    HUB.fault = fault
    with caplog.at_level(logging.ERROR):
        trainer = trained(tmp_path / "run", push_to_hub=True, hub_strategy="every_save")
    assert "the push failed" in caplog.text
    HUB.reset()
    trainer.push_to_hub()
    assert named().bank.manifest == ResponseBank.from_pretrained(tmp_path / "run").manifest


def test_other_tokenizer_is_refused(hub: World, tmp_path: Path) -> None:
    trained(tmp_path / "run").push_to_hub()
    other = tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(MismatchError, match=r"a vocabulary of sha256 .* and this tokenizer's is .*\['tokenizer'\]"):
        named(tokenizer=other)
    assert named(tokenizer=other, allow_mismatch=["tokenizer"]).bank
    with pytest.raises(ValueError, match="allow_mismatch="):
        named(allow_mismatch=["everything"])


def test_model_without_a_bank_is_named(hub: World, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    bank = ResponseBank.from_pretrained(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "fwdattr", tmp_path / "kept" / "fwdattr")
    shutil.rmtree(tmp_path / "run" / "fwdattr")
    trainer.push_to_hub()
    with pytest.raises(BankError, match=r"no bank: the list of files of me/adapter@\w+ does not exist"):
        named()
    kept = ResponseBank.from_pretrained(tmp_path / "kept")
    assert kept.manifest == bank.manifest
    assert named(bank=kept).scores(queries()).shape == (4, 12)
    kept.push_to_hub(NAME)
    assert named().scores(queries()).shape == (4, 12)


def test_bank_in_its_own_repository_is_found_by_model_name(hub: World, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run")
    before = live_scores(trainer)
    bank = ResponseBank.from_pretrained(tmp_path / "run")
    bank.save_pretrained(tmp_path / "kept")
    shutil.rmtree(tmp_path / "run" / "fwdattr")
    trainer.push_to_hub()
    ResponseBank.from_pretrained(tmp_path / "kept").push_to_hub("me/bank", repo_type="dataset", pointer_in=NAME)
    hub.clean()
    assert torch.equal(named().scores(queries()), before)
    assert set(json.loads(HUB.files(NAME)["fwdattr/bank.json"])) == {
        "schema_version", "checksum", "bank_repo", "repo_type", "revision", "subfolder",
    }  # fmt: skip
