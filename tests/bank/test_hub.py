"""Banks on a Hub: the real client over real HTTP, against the server of tests/helpers/hub_server.py."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.schema import sealed
from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.cli.app import app
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import ROWS, contents, described, is_seed, parts, written
from tests.helpers.hub_server import TOKEN
from tests.helpers.hub_world import World


NAME = "me/adapter"


def same(one: ResponseBank, other: ResponseBank) -> bool:
    first, second = contents(one), contents(other)
    return one.manifest == other.manifest and all(torch.equal(first[name], second[name]) for name in first)


def big(folder: Path, rows: int = 40_000, k: int = 64) -> ResponseBank:
    """Write a bank of more than 10 MB in several shards."""
    generator = torch.Generator().manual_seed(0)
    contents = BankContents(
        described(directions=k, dataset={"rows": rows}),
        [torch.randn(k, 6, generator=generator), torch.randn(2, 6, generator=generator)],
        torch.randn(rows, k, generator=generator), torch.arange(rows), torch.zeros(rows, 16, dtype=torch.uint8),
        torch.zeros(rows, dtype=torch.int64),
    )  # fmt: skip
    return write_bank(folder, contents, shard_size=3 << 20)


def test_large_bank_is_pushed_and_downloaded(hub: World, tmp_path: Path) -> None:
    bank = big(tmp_path / "bank")
    assert sum(file.size for file in bank.manifest.files) > 10 << 20
    address = bank.push_to_hub(NAME)
    assert NAME in address
    assert hub.server.count("PUT", "^/lfs/") == len(bank.manifest.files) > 3
    hub.clean()
    again = ResponseBank.from_pretrained(NAME)
    assert again.remote is not None
    assert again.remote.commit == hub.server.repo(NAME).refs["main"]
    assert same(again, bank)


def test_shards_are_downloaded_when_needed(hub: World, tmp_path: Path) -> None:
    big(tmp_path / "bank").push_to_hub(NAME)
    hub.clean()
    bank = ResponseBank.from_pretrained(NAME)
    assert hub.server.sent("safetensors") == 0
    bank.directions()
    directions = [file for file in bank.manifest.files if file.kind == "directions"]
    assert hub.server.sent("safetensors") == sum(file.size for file in directions)
    first = next(file for file in bank.manifest.files if file.kind == "coordinates")
    blocks = bank.coordinates()
    next(blocks)
    assert hub.server.sent("coordinates") == first.size
    before = hub.server.sent("safetensors")
    next(bank.coordinates())
    bank.directions()
    assert hub.server.sent("safetensors") == before


def test_source_directions_are_downloaded_alone(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME)
    hub.clean()
    bank = ResponseBank.from_pretrained(NAME)
    found = bank.directions(lines=slice(bank.manifest.directions, None))
    assert torch.equal(found, parts()["directions"][1])
    (file,) = (file for file in bank.manifest.files if file.kind == "directions" and file.first)
    assert hub.server.sent("safetensors") == file.size
    assert torch.equal(bank.directions(lines=slice(1, 4)), torch.cat(parts()["directions"])[1:4])


def test_branch_tag_and_commit_are_resolved(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "old").push_to_hub(NAME)
    api, old = HfApi(), hub.server.repo(NAME).refs["main"]
    api.create_tag(NAME, tag="v1")
    api.create_branch(NAME, branch="try")
    written(tmp_path / "new", seed=1).push_to_hub(NAME)
    written(tmp_path / "tried", seed=2).push_to_hub(NAME, revision="try")
    for revision, seed in ((None, 1), ("main", 1), ("v1", 0), (old, 0), ("try", 2)):
        assert is_seed(ResponseBank.from_pretrained(NAME, revision=revision), seed)


def test_open_bank_stays_at_its_commit(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "old").push_to_hub(NAME)
    bank = ResponseBank.from_pretrained(NAME)
    written(tmp_path / "new", seed=1).push_to_hub(NAME)
    assert is_seed(bank, 0)
    assert is_seed(ResponseBank.from_pretrained(NAME), 1)


def test_push_removes_only_the_shards_it_replaces(hub: World, tmp_path: Path) -> None:
    mine = {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n", "fwdattr/notes.txt": b"mine", "weights.pt": b"0"}
    hub.server.put(NAME, mine)
    written(tmp_path / "old").push_to_hub(NAME)
    old = set(hub.server.files(NAME))
    bank = written(tmp_path / "new", seed=1)
    bank.push_to_hub(NAME, commit_message="Another bank")
    names = {f"fwdattr/{file.name}" for file in bank.manifest.files}
    assert set(hub.server.files(NAME)) == names | set(mine) | {"fwdattr/bank.json"}
    assert len(old) == len(names | set(mine)) + 1
    card = ModelCard(hub.server.files(NAME)["README.md"].decode())
    assert card.data.get("license") == "mit"
    assert card.data.get("tags") == ["fwdattr"]
    assert card.text.count("## Response bank") == card.text.count("# Mine") == 1
    assert bank.manifest.weights[:16] in card.text


def test_local_path_is_not_published(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank", model="/srv/somebody/model", revision=None).push_to_hub(NAME)
    assert b"somebody" not in b"".join(hub.server.files(NAME).values())
    assert ResponseBank.from_pretrained(NAME).manifest.model is None


def test_only_files_of_the_bank_are_pushed(hub: World, tmp_path: Path) -> None:
    bank = written(tmp_path)
    for name in ("directions-0123abcd-00000.safetensors", ".partial-x", "secret.txt", "code.py", "weights.pkl"):
        (tmp_path / name).write_bytes(b"not mine")
    bank.push_to_hub(NAME)
    expected = {f"fwdattr/{file.name}" for file in bank.manifest.files} | {"fwdattr/bank.json", "README.md"}
    assert set(hub.server.files(NAME)) == expected


def test_repeated_push_uploads_nothing(hub: World, tmp_path: Path) -> None:
    bank = written(tmp_path)
    bank.push_to_hub(NAME)
    head = hub.server.repo(NAME).refs["main"]
    hub.server.requests.clear()
    bank.push_to_hub(NAME)
    assert hub.server.count("PUT") == 0
    assert hub.server.repo(NAME).refs["main"] == head


def test_interrupted_push_leaves_the_old_bank_and_is_resumed(hub: World, tmp_path: Path) -> None:
    old = written(tmp_path / "old")
    old.push_to_hub(NAME)
    head = hub.server.repo(NAME).refs["main"]
    bank = big(tmp_path / "bank")
    arrived = []

    def fault(method: str, path: str) -> str | None:
        if method != "PUT":
            return None
        arrived.append(path)
        return "drop" if len(set(arrived)) > 2 else None

    hub.server.fault = fault
    with pytest.raises(BankError, match=r"pushing to me/adapter: the connection failed .*\. Try again"):
        bank.push_to_hub(NAME)
    assert hub.server.repo(NAME).refs["main"] == head
    assert is_seed(ResponseBank.from_pretrained(NAME), 0)
    here = len(hub.server.objects)
    hub.server.reset()
    bank.push_to_hub(NAME)
    assert hub.server.count("PUT") == len(bank.manifest.files) + len(old.manifest.files) - here
    assert same(ResponseBank.from_pretrained(NAME), bank)


def test_concurrent_push_is_refused(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "old").push_to_hub(NAME)
    first, other = hub.server.repo(NAME).refs["main"], written(tmp_path / "new", seed=1)

    def faster(repo: Any) -> None:
        hub.server.before_commit = lambda repo: None
        hub.server.put(NAME, {"theirs.txt": b"theirs"})

    hub.server.before_commit = faster
    with pytest.raises(BankError, match=f"me/adapter changed while the bank was being pushed .it was at {first}"):
        other.push_to_hub(NAME)
    assert is_seed(ResponseBank.from_pretrained(NAME), 0)
    assert hub.server.files(NAME)["theirs.txt"] == b"theirs"
    other.push_to_hub(NAME)
    assert is_seed(ResponseBank.from_pretrained(NAME), 1)
    with pytest.raises(BankError, match="changed while the bank was being pushed"):
        written(tmp_path / "late", seed=2).push_to_hub(NAME, parent_commit=first)


def test_pull_request_leaves_main_alone(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "old").push_to_hub(NAME)
    address = written(tmp_path / "new", seed=1).push_to_hub(NAME, create_pr=True)
    assert address.endswith("/discussions/1")
    assert is_seed(ResponseBank.from_pretrained(NAME), 0)
    assert is_seed(ResponseBank.from_pretrained(NAME, revision="refs/pr/1"), 1)


def test_private_bank_needs_a_token(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME, private=True)
    assert hub.server.repo(NAME).private
    hub.log_out()
    with pytest.raises(BankError, match=r"me/adapter: no such repository, or it is private\. .* pass token="):
        ResponseBank.from_pretrained(NAME)
    with pytest.raises(BankError, match="pushing to me/adapter"):
        written(tmp_path / "new", seed=1).push_to_hub(NAME)
    assert is_seed(ResponseBank.from_pretrained(NAME, token=TOKEN), 0)


def test_missing_repository_revision_and_bank_are_named(hub: World, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="me/missing: no such repository"):
        ResponseBank.from_pretrained("me/missing")
    hub.server.put(NAME, {"README.md": b"a model"})
    with pytest.raises(BankError, match=r"no bank: the list of files of me/adapter@\w+ does not exist\. Push one"):
        ResponseBank.from_pretrained(NAME)
    with pytest.raises(BankError, match="me/adapter at v9: there is no such revision"):
        ResponseBank.from_pretrained(NAME, revision="v9")
    hub.server.put(NAME, {"fwdattr/notes.txt": b""})
    with pytest.raises(BankError, match=r"no bank in me/adapter@\w+: there is no fwdattr/bank.json"):
        ResponseBank.from_pretrained(NAME)


def test_cached_bank_opens_offline(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME)
    kept = contents(ResponseBank.from_pretrained(NAME))
    hub.offline()
    found = contents(ResponseBank.from_pretrained(NAME))
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    hub.clean()
    with pytest.raises(BankError, match="me/adapter is not in the cache and the Hub cannot be asked"):
        ResponseBank.from_pretrained(NAME)


def test_hub_arguments_are_passed_on(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME, subfolder="elsewhere")
    with pytest.raises(BankError, match="is not in the cache"):
        ResponseBank.from_pretrained(NAME, subfolder="elsewhere", local_files_only=True)
    mine = tmp_path / "my cache"
    assert is_seed(ResponseBank.from_pretrained(NAME, subfolder="elsewhere", cache_dir=mine), 0)
    assert not hub.cache.exists() or not list(hub.cache.rglob("*.safetensors"))
    before = hub.server.sent("directions")
    assert is_seed(ResponseBank.from_pretrained(NAME, subfolder="elsewhere", cache_dir=mine, local_files_only=True), 0)
    assert hub.server.sent("directions") == before
    ResponseBank.from_pretrained(NAME, subfolder="elsewhere", cache_dir=mine, force_download=True).directions()
    assert hub.server.sent("directions") == 2 * before


def test_saved_copy_of_a_remote_bank_is_whole(hub: World, tmp_path: Path) -> None:
    bank = written(tmp_path / "bank", shard_size=100)
    bank.push_to_hub(NAME)
    ResponseBank.from_pretrained(NAME).save_pretrained(tmp_path / "copy")
    assert same(ResponseBank.from_pretrained(tmp_path / "copy"), bank)
    ResponseBank.from_pretrained(NAME).push_to_hub("me/fork")
    assert same(ResponseBank.from_pretrained("me/fork"), bank)


def test_pointer_leads_to_a_bank_in_a_dataset_repository(hub: World, tmp_path: Path) -> None:
    hub.server.put(NAME, {"README.md": b"---\ntags:\n- lora\n---\n# Model\n", "adapter.bin": b"0"})
    bank = written(tmp_path / "bank")
    bank.push_to_hub("me/bank", repo_type="dataset", pointer_in=NAME)
    pinned = hub.server.repo("me/bank", "dataset").refs["main"]
    written(tmp_path / "newer", seed=1).push_to_hub("me/bank", repo_type="dataset")
    found = ResponseBank.from_pretrained(NAME)
    assert found.remote is not None
    assert (found.remote.repo, found.remote.repo_type, found.remote.commit) == ("me/bank", "dataset", pinned)
    assert same(found, bank)
    assert is_seed(ResponseBank.from_pretrained("me/bank", repo_type="dataset"), 1)
    files = hub.server.files(NAME)
    assert json.loads(files["fwdattr/bank.json"])["revision"] == pinned
    assert "(/datasets/me/bank)" in files["README.md"].decode()
    (tmp_path / "local" / "fwdattr").mkdir(parents=True)
    (tmp_path / "local" / "fwdattr" / "bank.json").write_bytes(files["fwdattr/bank.json"])
    assert same(ResponseBank.from_pretrained(tmp_path / "local"), bank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "main"}, "revision: String should match"),
        ({"bank_repo": "../../etc"}, "bank_repo: String should match"),
        ({"bank_repo": "http://x/y"}, "bank_repo: String should match"),
        ({"repo_type": "space"}, "repo_type: Input should be 'model' or 'dataset'"),
        ({"subfolder": "../x"}, "subfolder: String should match"),
        ({"run": "this"}, "run: Extra inputs are not permitted"),
        ({"bank_repo": "me/missing"}, "me/missing@000000000000: no such repository"),
    ],
)
def test_unsound_pointer_is_refused(hub: World, change: dict[str, str], message: str) -> None:
    pointer = {"schema_version": 2, "bank_repo": "me/bank", "revision": "0" * 40} | change
    hub.server.put(NAME, {"fwdattr/bank.json": sealed(pointer)})
    with pytest.raises(BankError, match=message):
        ResponseBank.from_pretrained(NAME)


def test_pointer_to_a_pointer_is_refused(hub: World) -> None:
    commit = hub.server.put(NAME, {})
    pointer = {"schema_version": 2, "bank_repo": NAME, "repo_type": "model", "revision": commit}
    for _ in range(2):
        commit = hub.server.put(NAME, {"fwdattr/bank.json": sealed(pointer | {"revision": commit})})
    with pytest.raises(BankError, match="A pointer cannot lead to another pointer"):
        ResponseBank.from_pretrained(NAME)


def test_dropped_connection_is_tried_again(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME)
    hub.clean()
    dropped: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "GET" and "resolve" in path and path not in dropped:
            dropped.append(path)
            return "drop"
        return None

    hub.server.fault = fault
    assert is_seed(ResponseBank.from_pretrained(NAME), 0)
    assert len(dropped) >= 2


def test_silent_hub_is_named(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME)
    hub.clean()
    bank = ResponseBank.from_pretrained(NAME)
    hub.server.fault = lambda method, path: "drop"
    with pytest.raises(BankError, match=r"directions-.* of me/adapter@.*: the connection failed|cannot be asked"):
        bank.directions()
    hub.server.reset()
    assert is_seed(bank, 0)


def test_truncated_body_is_continued_or_refused(hub: World, tmp_path: Path) -> None:
    big(tmp_path / "bank", rows=4000).push_to_hub(NAME)
    hub.clean()
    bank = ResponseBank.from_pretrained(NAME)
    cuts: list[str] = []

    def fault(method: str, path: str) -> int | None:
        if method == "GET" and "safetensors" in path and len(cuts) < 2:
            cuts.append(path)
            return 100
        return None

    hub.server.fault = fault
    try:
        rows = sum(len(block) for _, _, block in bank.coordinates())
    except BankError:
        hub.server.reset()
        rows = sum(len(block) for _, _, block in bank.coordinates())
    assert cuts
    assert rows == 4000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"fwdattr/coordinates-\S+ is missing in me/adapter@"),
        ("truncated", r"has \d+ bytes in me/adapter@\w+ and bank.json says \d+"),
        ("flipped", r"in me/adapter@\w+ has sha256 \w+... and bank.json says"),
        ("huge manifest", r"bank.json of me/adapter@\w+ has 67108865 bytes\. A manifest has at most"),
        ("absolute", "which is not a plain file name"),
        ("parent", "which is not a plain file name"),
        ("extra", r"me/adapter@\w+ holds 'weights.pkl', which bank.json does not name"),
    ],
)
def test_damage_on_the_hub_is_refused_before_download(hub: World, tmp_path: Path, damage: str, message: str) -> None:
    bank = written(tmp_path / "bank")
    bank.push_to_hub(NAME)
    hub.clean()
    file = next(file for file in bank.manifest.files if file.kind == "coordinates")
    path, files = f"fwdattr/{file.name}", hub.server.files(NAME)
    manifest = json.loads(files["fwdattr/bank.json"])
    if damage == "missing":
        repo = hub.server.repo(NAME)
        repo.commit("main", {k: v for k, v in repo.commits[repo.refs["main"]].items() if k != path})
    elif damage == "truncated":
        hub.server.put(NAME, {path: files[path][:-1]})
    elif damage == "flipped":
        hub.server.put(NAME, {path: files[path][:-1] + bytes([files[path][-1] ^ 1])})
    elif damage == "huge manifest":
        hub.server.put(NAME, {"fwdattr/bank.json": b" " * ((1 << 26) + 1)})
    elif damage == "extra":
        hub.server.put(NAME, {"fwdattr/weights.pkl": b"\x80\x04K\x01."})
    else:
        manifest["files"][0]["name"] = "/etc/passwd" if damage == "absolute" else "../../README.md"
        hub.server.put(NAME, {"fwdattr/bank.json": sealed(manifest)})
    with pytest.raises(BankError, match=message):
        ResponseBank.from_pretrained(NAME)
    assert hub.server.sent("safetensors") == 0
    assert hub.server.sent(r"bank\.json") < 10_000


def test_changed_cache_is_refused(hub: World, tmp_path: Path) -> None:
    written(tmp_path / "bank").push_to_hub(NAME)
    ResponseBank.from_pretrained(NAME).directions()
    path = min(hub.cache.rglob("directions-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    hub.offline()
    with pytest.raises(BankError, match="was changed: its sha256"):
        ResponseBank.from_pretrained(NAME).directions()


def test_card_describes_the_bank(hub: World, tmp_path: Path) -> None:
    known = {"rows": ROWS, "repo": "me/facts", "split": "train", "revision": "abc"}
    fields = described(dataset=known, quality={"lds": 0.85}, model="base/model", revision="f" * 40)
    bank = write_bank(tmp_path, BankContents(fields, **parts()))
    bank.push_to_hub(NAME)
    card = ModelCard.load(NAME)
    assert card.data.datasets == ["me/facts"]
    assert "0.900 of held-out scores" in card.text
    assert "lds 0.85" in card.text
    assert f"`base/model` at `{'f' * 40}`" in card.text
    assert f'model="{NAME}"' in card.text
    assert "`me/facts` (train) at `abc`" in card.text


def test_inspection_reads_headers_and_no_shard(hub: World, tmp_path: Path) -> None:
    bank = big(tmp_path / "bank")
    bank.push_to_hub(NAME)
    hub.clean()
    assert ResponseBank.from_pretrained(NAME).inspect().manifest == bank.manifest
    assert hub.server.sent("safetensors") <= 100_001 * len(bank.manifest.files) < 1 << 20
    assert not list(hub.cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04K\x01.", "has no sound safetensors header"),
        (b"\xff" * 16, "has no sound safetensors header"),
        (b"\x08" + b"\0" * 7 + b'{"a": 1}', "has no sound safetensors header"),
        (b"\x02" + b"\0" * 7 + b"{}", r"holds \{\} and bank.json says"),
    ],
    ids=["pickle", "endless header", "no table", "empty"],
)
def test_unsound_shard_is_named_by_inspection_and_reading(
    hub: World, tmp_path: Path, data: bytes, message: str
) -> None:
    """Size and hash are those in bank.json, as a forger would write them."""
    bank = written(tmp_path / "bank")
    bank.push_to_hub(NAME)
    file = next(file for file in bank.manifest.files if file.kind == "directions")
    forged = file.model_copy(update={"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    files = [forged if known is file else known for known in bank.manifest.files]
    manifest = bank.manifest.model_copy(update={"files": files})
    hub.server.put(NAME, {f"fwdattr/{file.name}": data, "fwdattr/bank.json": manifest.to_json()})
    found = ResponseBank.from_pretrained(NAME)
    with pytest.raises(BankError, match=message):
        found.inspect()
    with pytest.raises(BankError, match=r"sound safetensors|holds \{\} and bank.json says"):
        found.directions()


def test_command_line_pushes_and_inspects(hub: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    bank = written(tmp_path / "model" / "fwdattr")

    def call(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    pushed = call("push", tmp_path / "model", NAME, "--private")
    assert pushed.exit_code == 0, pushed.output
    assert "pushed: " in pushed.output
    seen = call("inspect", NAME)
    assert seen.exit_code == 0, seen.output
    assert "sizes, hashes and headers agree" in " ".join(seen.output.split())
    assert "ids and salted hashes, no text" in seen.output
    assert json.loads(call("inspect", NAME, "--json").stdout) == json.loads(bank.manifest.to_json())
    failed = call("inspect", NAME, "--revision", "v9")
    assert failed.exit_code == 1
    assert "there is no such revision" in failed.output
    pointed = call("push", tmp_path / "model", "me/bank", "--repo-type", "dataset", "--pointer-in", "me/other")
    assert pointed.exit_code == 0, pointed.output
    assert same(ResponseBank.from_pretrained("me/other"), bank)
