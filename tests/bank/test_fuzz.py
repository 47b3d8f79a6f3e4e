"""Random damage to everything that is parsed: refused as damage, never a crash, never believed."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.files import read_header
from hf_fwdattr.bank.schema import sealed
from hf_fwdattr.bank.verification import read_manifest, read_pointer
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import TEXTS, contents, written, written_whole, written_with_text
from tests.bank.test_damage import resign, shard


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
POINTER = {"schema_version": 2, "bank_repo": "me/bank", "repo_type": "dataset", "revision": "0" * 40}
# Fields that the shards must agree with; the rest of bank.json is description.
STRUCTURE = ("directions", "source_directions", "dtype", "coordinates_dtype", "error_variances", "privacy", "files")


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of everything that can be changed in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield (*path, key)
        yield from paths(child, (*path, key))


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
def test_forged_manifest_cannot_contradict_its_shards(
    folder: Path, whole: dict[str, Any], data: st.DataObject, how: str, new: Any
) -> None:
    """The checksum is made to fit, as a forger would."""
    path = data.draw(st.sampled_from(list(paths(whole))))
    values = changed(whole, path, how, new)
    (folder / "bank.json").write_bytes(sealed(values))
    try:
        bank = ResponseBank.from_pretrained(folder)
        read = contents(bank)
    except BankError:
        return
    finally:
        (folder / "bank.json").write_bytes(sealed(whole))
    said = json.loads(bank.manifest.to_json())
    assert {key: said[key] for key in STRUCTURE} == {key: whole[key] for key in STRUCTURE}
    assert len(read["coordinates"]) == said["dataset"]["rows"] == whole["dataset"]["rows"]
    assert bank.manifest.size == read["directions"].shape[1]
    assert read["texts"] == TEXTS
    assert len(said["sources"]) == len(whole["sources"])


@OFTEN
@given(data=st.data(), how=st.sampled_from(["replace", "delete", "add"]), new=VALUES)
def test_forged_pointer_leads_to_a_commit_or_nowhere(tmp_path: Path, data: st.DataObject, how: str, new: Any) -> None:
    values = changed(POINTER, data.draw(st.sampled_from(list(paths(POINTER)))), how, new)
    (tmp_path / "bank.json").write_bytes(sealed(values))
    with suppress(BankError):
        pointer = read_pointer(tmp_path / "bank.json")
        assert pointer is None or (len(pointer.revision) == 40 and pointer.bank_repo.count("/") == 1)


def damaged(text: bytes, how: str, random: Random) -> bytes:
    at = random.randrange(len(text))
    if how == "flip":
        return text[:at] + bytes([text[at] ^ 1 << random.randrange(8)]) + text[at + 1 :]
    if how == "cut":
        return text[:at] + text[at + random.randint(1, 40) :]
    return text[:at] + random.randbytes(random.randint(1, 8)) + text[at:]


@pytest.mark.parametrize("how", ["flip", "cut", "insert"])
@pytest.mark.parametrize("kind", ["manifest", "pointer"])
def test_damaged_bytes_are_never_accepted(folder: Path, tmp_path: Path, kind: str, how: str) -> None:
    """Only bytes that parse to the very same content may pass, such as a space more."""
    text = sealed(POINTER) if kind == "pointer" else (folder / "bank.json").read_bytes()
    path, random = tmp_path / "bank.json", Random(0)
    for _ in range(1000):
        changed_text = damaged(text, how, random)
        path.write_bytes(changed_text)
        try:
            read_pointer(path) if kind == "pointer" else read_manifest(tmp_path)
        except BankError:
            continue
        assert json.loads(changed_text) == json.loads(text)


READS: dict[str, Callable[[ResponseBank], object]] = {
    "directions": lambda bank: bank.directions(),
    "coordinates": lambda bank: (list(bank.coordinates()), list(bank.row_hashes()), bank.outside()),
    "text": lambda bank: bank.texts(range(len(bank))),
    "row_codes": lambda bank: (list(bank.row_codes()), bank.decode_rows([1])),
    "code_weights": lambda bank: bank.code_weights,
    "page_hashes": lambda bank: bank.page_hashes(bank.manifest.files_of("row_codes")[0]),
    "error_projections": lambda bank: bank.error_projections(),
    "derivative_regression": lambda bank: bank.derivative_regression(),
    "averaged_weights": lambda bank: bank._averaged_weights,
}


@pytest.mark.parametrize("how", ["flip", "cut", "insert", "remove"])
@pytest.mark.parametrize("kind", READS)
def test_damaged_shard_is_refused_when_opened_and_when_read(tmp_path: Path, kind: str, how: str) -> None:
    """A bank that is already open notices too, before it reads a number."""
    bank, random = written_whole(tmp_path), Random(0)
    path = shard(tmp_path, kind)
    raw = path.read_bytes()
    for _ in range(40 if how != "remove" else 1):
        path.unlink()  # the file may still be mapped: another one takes its place
        if how != "remove":
            path.write_bytes(damaged(raw, how, random))
        if how == "cut" and path.read_bytes() == raw:
            continue
        with pytest.raises(BankError, match="replaced, changed or removed while it was open"):
            READS[kind](bank)
        with pytest.raises(BankError):
            ResponseBank.from_pretrained(tmp_path)
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    READS[kind](bank)
    READS[kind](ResponseBank.from_pretrained(tmp_path))


def test_bank_that_was_replaced_while_open_says_so(tmp_path: Path) -> None:
    bank = written(tmp_path, seed=0)
    written(tmp_path, seed=1)
    for read in (READS["directions"], READS["coordinates"]):
        with pytest.raises(BankError, match="replaced, changed or removed while it was open"):
            read(bank)


@OFTEN
@given(text=st.text(max_size=60) | st.binary(max_size=60))
def test_manifest_of_random_bytes_is_refused(tmp_path: Path, text: str | bytes) -> None:
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
def test_changed_header_changes_no_tensor(
    folder: Path, before: dict[str, Any], data: st.DataObject, kind: str, how: str, new: Any
) -> None:
    """Size and hash in bank.json are made to fit, as a forger would."""
    path = shard(folder, kind)
    raw, told = path.read_bytes(), (folder / "bank.json").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    table = changed(table, data.draw(st.sampled_from(list(paths(table)))), how, new)
    text = json.dumps(table).encode()
    path.unlink()  # the file may still be mapped: another one takes its place
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    resign(folder, path)
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
def test_shard_of_random_bytes_is_refused(tmp_path: Path, data: bytes, claimed: int) -> None:
    path = tmp_path / "directions.safetensors"
    path.write_bytes(struct.pack("<Q", min(claimed, 2**64 - 1)) + data)
    with suppress(BankError):
        assert sum(len(shape) for _, shape in read_header(path).values()) >= 0
