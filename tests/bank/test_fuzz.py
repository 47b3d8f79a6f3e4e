"""Random damage to what is parsed: refused as a bank's damage, or harmless; never a crash, never believed."""

import copy
import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.files import check_header
from hf_fwdattr.bank.schema import read_pointer
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import TEXTS, contents, written_with_text
from tests.bank.test_damage import sealed, shard


OFTEN = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1 << 62, 1 << 400, 0.5, "../x", "/etc/passwd", "float32", "directions", "0" * 64])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
# What the shards must agree with; the rest of bank.json is description.
STRUCTURE = ("directions", "source_directions", "dtype", "privacy", "files")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be changed in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], how: str, new: Any) -> Any:
    value = copy.deepcopy(value)
    *above, last = path
    inner = value
    for key in above:
        inner = inner[key]
    if how == "delete":
        del inner[last]
    elif how == "add" and isinstance(inner, dict):
        inner[str(new)[:20]] = new
    elif how == "add":
        inner.append(new)
    else:
        inner[last] = new
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank")
    written_with_text(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bank.json").read_text())


@OFTEN
@given(data=st.data(), how=st.sampled_from(["replace", "replace", "delete", "add"]), new=VALUES)
def test_a_changed_manifest(folder: Path, whole: dict[str, Any], data: st.DataObject, how: str, new: Any) -> None:
    path = data.draw(st.sampled_from(list(places(whole))))
    values = changed(whole, path, how, new)
    (folder / "bank.json").write_text(json.dumps(values))
    try:
        bank = ResponseBank.from_pretrained(folder)
        read = contents(bank)
    except BankError:
        return
    finally:
        (folder / "bank.json").write_text(json.dumps(whole))
    said = json.loads(bank.manifest.to_json())
    assert {key: said[key] for key in STRUCTURE} == {key: whole[key] for key in STRUCTURE}
    assert len(read["coordinates"]) == said["dataset"]["rows"] == whole["dataset"]["rows"]
    assert bank.manifest.size == read["directions"].shape[1]
    assert read["texts"] == TEXTS
    assert len(said["sources"]) == len(whole["sources"])


@OFTEN
@given(data=st.data(), how=st.sampled_from(["replace", "delete", "add"]), new=VALUES)
def test_a_changed_pointer(tmp_path: Path, data: st.DataObject, how: str, new: Any) -> None:
    whole = {"schema_version": 2, "bank_repo": "me/bank", "repo_type": "dataset", "revision": "0" * 40}
    values = changed(whole, data.draw(st.sampled_from(list(places(whole)))), how, new)
    (tmp_path / "bank.json").write_text(json.dumps(values))
    with suppress(BankError):
        pointer = read_pointer(tmp_path / "bank.json")
        assert pointer is None or (len(pointer.revision) == 40 and pointer.bank_repo.count("/") == 1)


@OFTEN
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_a_manifest_of_anything(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "bank.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BankError):
        ResponseBank.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, Any]:
    return copy.deepcopy(contents(ResponseBank(folder)))


@OFTEN
@given(
    data=st.data(), kind=st.sampled_from(["directions", "coordinates", "text"]),
    how=st.sampled_from(["replace", "delete", "add"]), new=VALUES,
)  # fmt: skip
def test_a_changed_header(
    folder: Path, before: dict[str, Any], data: st.DataObject, kind: str, how: str, new: Any
) -> None:
    """Size and hash in bank.json are made to fit, as a forger would."""
    path = shard(folder, kind)
    raw, told = path.read_bytes(), (folder / "bank.json").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    table = changed(table, data.draw(st.sampled_from(list(places(table)))), how, new)
    text = json.dumps(table).encode()
    path.unlink()  # the file may still be mapped: another one takes its place
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    sealed(folder, path)
    try:
        after = copy.deepcopy(contents(ResponseBank(folder)))
    except BankError:
        return
    finally:
        path.unlink()
        path.write_bytes(raw)
        (folder / "bank.json").write_bytes(told)
    assert after.pop("texts") == before["texts"]
    assert all(torch.equal(after[name], before[name]) for name in after)


@OFTEN
@given(data=st.binary(max_size=200), claimed=st.integers(0, 1 << 64 - 1) | st.integers(0, 250))
def test_a_shard_of_anything(tmp_path: Path, data: bytes, claimed: int) -> None:
    path = tmp_path / "directions.safetensors"
    path.write_bytes(struct.pack("<Q", min(claimed, 2**64 - 1)) + data)
    with suppress(BankError):
        assert sum(len(shape) for _, shape in check_header(path).values()) >= 0
