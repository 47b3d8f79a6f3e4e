"""Damaged and forged banks: every damage is named, and nothing of it is believed or allocated."""

import hashlib
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.files import read_header
from hf_fwdattr.bank.schema import sealed
from hf_fwdattr.errors import BankError
from tests.bank.test_bank import FILES, REGRESSION, ROWS, SOURCES, K, P, described, written, written_whole


Damage = Callable[[Path], object]


def shard(folder: Path, kind: str) -> Path:
    """Return the first shard of a kind."""
    return min(folder.glob(f"{kind}-*.safetensors"))


def of_kind(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the first shard of a kind in a bank.json."""
    return next(file for file in values["files"] if file["kind"] == kind)


def edited(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change a field of bank.json, and its checksum with it, as a forger would."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "bank.json").read_text())
        change(values)
        (folder / "bank.json").write_bytes(sealed(values))

    return damage


def resign(folder: Path, path: Path) -> None:
    """Write a shard's real size and hash into bank.json, as a forger would."""

    def seal(values: dict[str, Any]) -> None:
        for file in values["files"]:
            if file["name"] == path.name:
                file |= {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    edited(seal)(folder)


def forged(kind: str, change: Damage) -> Damage:
    """Change a shard and its hash with it."""

    def damage(folder: Path) -> None:
        change(shard(folder, kind))
        resign(folder, shard(folder, kind))

    return damage


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def header(text: bytes, data: bytes = b"", claimed: int | None = None) -> Damage:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)


def tensors(path: Path, **changes: Any) -> None:
    """Write a coordinate shard with tensors replaced, or left out where None."""
    whole = {
        "coordinates": torch.zeros(ROWS, K), "row_ids": torch.arange(ROWS),
        "row_hashes": torch.zeros(ROWS, 16, dtype=torch.uint8), "sources": torch.zeros(ROWS, dtype=torch.int32),
    } | changes  # fmt: skip
    save_file({name: value for name, value in whole.items() if value is not None}, path)


def put(key: str, value: Any) -> Damage:
    return edited(lambda values: values.update({key: value}))


def renamed(name: str) -> Damage:
    return edited(lambda values: values["files"][0].update(name=name))


def linked(folder: Path) -> None:
    path = shard(folder, "directions")
    outside = folder.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def linked_manifest(folder: Path) -> None:
    (folder / "bank.json").rename(folder.parent / "outside")
    (folder / "bank.json").symlink_to(folder.parent / "outside")


def swapped(one: str, other: str) -> Damage:
    """Exchange the names of two shards."""

    def damage(folder: Path) -> None:
        first, second = shard(folder, one), shard(folder, other)
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1]), second.write_bytes(contents[0])

    return damage


def as_folder(folder: Path) -> None:
    path = shard(folder, "directions")
    path.unlink()
    path.mkdir()


def truncated(folder: Path) -> None:
    with shard(folder, "coordinates").open("r+b") as file:
        file.truncate(shard(folder, "coordinates").stat().st_size - 1)


def without_variances(folder: Path) -> None:
    shard(folder, "derivative_regression").unlink()

    def change(values: dict[str, Any]) -> None:
        files = [file for file in values["files"] if file["kind"] != "derivative_regression"]
        values.update(error_variances=[], regression_features=0, files=files)

    edited(change)(folder)


PICKLE = pickle.dumps({"directions": [[0.0] * P] * K}, protocol=4) + b"\0" * 400
ENTRY = '{"directions":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}}'
BYTES = K * P * 4
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no manifest": (lambda f: (f / "bank.json").unlink(), r"no bank in .*: there is no bank\.json"),
    "no JSON": (lambda f: (f / "bank.json").write_text("{"), r"bank\.json is not sound JSON"),
    "not UTF-8": (lambda f: (f / "bank.json").write_bytes(b"\xff"), r"bank\.json is not sound JSON"),
    "a list": (lambda f: (f / "bank.json").write_text("[]"), "schema_version is None and this package reads 2"),
    "deep": (lambda f: (f / "bank.json").write_text("[" * 10**5), r"bank\.json is not sound JSON"),
    "doubled key": (lambda f: (f / "bank.json").write_text('{"schema_version": 2, "schema_version": 2}'),
        "a key appears twice"),
    "wide": (lambda f: (f / "bank.json").write_text("[" + "[]," * 10**6 + "[]]"),
        r"it holds up to \d+ values; at most"),
    "long number": (lambda f: (f / "bank.json").write_text('{"schema_version": 2' + "0" * 10**6 + "}"),
        r"bank\.json is not sound JSON .Exceeds the limit"),
    "deep objects": (lambda f: (f / "bank.json").write_text('{"a":' * 10**5), r"bank\.json is not sound JSON"),
    "linked manifest": (linked_manifest, r"bank\.json is a link that leads out of the bank's folder"),
    "huge manifest": (lambda f: os.truncate(f / "bank.json", 1 << 27), "A manifest has at most"),
    "earlier schema": (put("schema_version", 1),
        r"schema_version is 1, of an earlier development version.* train again"),
    "later schema": (put("schema_version", 3), r"schema_version is 3 and this package reads 2\. Update hf-fwdattr"),
    "other checksum": (
        lambda f: (f / "bank.json").write_text((f / "bank.json").read_text().replace('"causal-lm"', '"other"')),
        r"checksum is '\w{16}' and its content has '\w{16}'",
    ),
    "no checksum": (lambda f: (f / "bank.json").write_text(json.dumps({"schema_version": 2})),
        "checksum is 'None' and its content has"),
    "extra key": (put("run_this", "rm"), r"run_this: Extra inputs are not permitted \(found 'rm'\)"),
    "missing key": (edited(lambda v: v.pop("weights")), "weights: Field required"),
    "wrong kind": (put("directions", "3"), r"directions: Input should be a valid integer \(found '3'\)"),
    "no directions": (put("directions", 0), "directions: Input should be greater than or equal to 1"),
    "no rows": (edited(lambda v: v["dataset"].update(rows=0)), r"dataset\.rows: Input should be greater"),
    "NaN in JSON": (put("explained_variance", float("nan")), "explained_variance: Input should be"),
    "no hash": (put("weights", "../../etc"), "weights: String should match pattern"),
    "unknown dtype": (put("dtype", "float64"), "dtype: Input should be 'float32', 'bfloat16', 'float16' or 'int8'"),
    "sources twice": (put("sources", ["one", "one"]), "sources names something twice"),
    "parameters twice": (edited(lambda v: v["parameters"].append(v["parameters"][0])),
        "parameters names something twice"),
    "scales": (put("source_scales", [1.0]), "source_directions=2 and 1 source_scales do not fit 2 sources"),
    "absolute path": (renamed("/etc/passwd"), "'/etc/passwd', which is not a plain file name"),
    "parent path": (renamed("../directions.safetensors"),
        r"'\.\./directions\.safetensors', which is not a plain file name"),
    "sub-folder": (renamed("a/b.safetensors"), "which is not a plain file name"),
    "backslash": (renamed("..\\b.safetensors"), "which is not a plain file name"),
    "file twice": (edited(lambda v: v["files"].append(v["files"][0])), "files names something twice"),
    "extra shard": (lambda f: (f / "more.safetensors").write_bytes(b"0"), "holds 'more.safetensors', which bank.json"),
    "extra pickle": (lambda f: (f / "weights.pkl").write_bytes(PICKLE),
        "holds 'weights.pkl', which bank.json does not"),
    "extra program": (lambda f: (f / "run.py").write_text("1"), "holds 'run.py', which bank.json does not name"),
    "extra link": (lambda f: (f / "here").symlink_to(f.parent), "holds 'here', which bank.json does not name"),
    "swapped kinds": (swapped("directions", "coordinates"), r"has \d+ bytes and bank\.json says \d+"),
    "missing text": (lambda f: shard(f, "text").unlink(), r"text-.* is missing. Download the bank again"),
    "flipped text": (lambda f: flipped(shard(f, "text")),
        r"was changed: its sha256 is \w{16}\.\.\. and bank\.json says"),
    "undeclared text": (put("privacy", {}), "the shards hold 10 lines of text and bank.json says 0"),
    "undeclared row codes": (edited(lambda v: v.update(row_codes=0, error_variances=[], regression_features=0)),
        "the shards hold 10 lines of row_codes and bank.json says 0"),
    "one error projection more": (edited(lambda v: v["error_projections"].append({"name": "more", "shape": [1, 1]})),
        "the shards hold 2 lines of error_projections and bank.json says 3"),
    "error projections twice": (edited(lambda v: v["error_projections"].append(v["error_projections"][0])),
        "error_projections names something twice"),
    "error projection that is no matrix": (edited(lambda v: v["error_projections"][0].update(shape=[9])),
        "an error projection is a matrix"),
    "other error projection": (edited(lambda v: v["error_projections"][0].update(shape=[1, 9])),
        r"holds .*'F16', \(3, 3\).* bank\.json says"),
    "wider row codes": (
        forged("row_codes", lambda p: save_file({"codes": torch.zeros(10, 6).int(), "scales": torch.zeros(10, 1)}, p)),
        r"'codes': \('I32', \(10, 6\)\)",
    ),
    "other bits of row codes": (put("row_code_bits", 8), r"\('U8', \(10, 4\)\).*'codes': \('U8', \(10, 8\)\)"),
    "unknown bits of row codes": (put("row_code_bits", 3), "row_code_bits: Input should be 1, 2, 4 or 8"),
    "fewer variances": (put("error_variances", [1.0]), "1 error_variances do not fit 3 directions and 10 row codes"),
    "codes of exact directions": (put("exact", True), "row_codes=10 of rows that exact directions hold already"),
    "no variances": (without_variances, "'outside'"),
    "regression without variances": (put("error_variances", []), "5 regression_features without error_variances"),
    "undeclared regression": (put("regression_features", 0),
        "the shards hold 6 lines of derivative_regression and bank.json says 0"),
    "more features": (put("regression_features", 6),
        "the shards hold 6 lines of derivative_regression and bank.json says 7"),
    "regression of other directions": (
        forged(
            "derivative_regression", lambda p: save_file(REGRESSION | {"weights": torch.zeros(6, 2).bfloat16()}, p)
        ),
        r"'weights': \('BF16', \(6, 2\)\)",
    ),
    "fewer means": (
        forged("derivative_regression", lambda p: save_file(REGRESSION | {"means": torch.zeros(5)}, p)),
        r"'means': \('F32', \(5,\)\)",
    ),
    "too good a regression": (put("regression_explained_variance", 1.5),
        "regression_explained_variance: Input should be less than or equal to 1"),
    "flipped regression": (lambda f: flipped(shard(f, "derivative_regression")),
        r"was changed: its sha256 is \w{16}\.\.\. and bank\.json says"),
    "negative variance": (put("error_variances", [-1.0, 1.0, 1.0]), "greater than or equal to 0"),
    "scales of coordinates that are floats": (put("coordinate_scales", [1.0] * 3),
        "3 coordinate_scales do not fit 3 directions and coordinates in float32"),
    "coordinates of another type": (put("coordinates_dtype", "float16"), r"'coordinates': \('F16', \(10, 3\)\)"),
    "one more": (
        forged("row_codes", lambda p: save_file({"codes": torch.zeros(10, 6).int(), "scales": torch.zeros(10, 1)}, p)),
        r"'codes': \('I32', \(10, 6\)\)",
    ),
    "too good a gradient predictor": (put("predictor_explained_variance", 1.5),
        "predictor_explained_variance: Input should be less than or equal to 1"),
    "undeclared weights": (put("averaging", "none"),
        "the shards hold 1 lines of averaged_weights and bank.json says 0"),
    "missing weights": (lambda f: shard(f, "averaged_weights").unlink(), "is missing. Download the bank again"),
    "fewer weights": (forged("averaged_weights", lambda p: save_file({"averaged_weights": torch.zeros(P - 1)}, p)),
        r"'averaged_weights': \('F32', \(5,\)\)"),
    "other averaging": (put("averaging", "first"), "averaging: Input should be 'none' or 'trajectory'"),
    "missing row codes": (lambda f: shard(f, "row_codes").unlink(), "is missing. Download the bank again"),
    "missing page hashes": (lambda f: shard(f, "page_hashes").unlink(), "is missing. Download the bank again"),
    "flipped page hashes": (lambda f: flipped(shard(f, "page_hashes")),
        r"page_hashes-\S+ was changed: its sha256 is \w{16}\.\.\. and bank\.json says"),
    "unnamed page hashes": (
        edited(lambda v: v.update(files=[file for file in v["files"] if file["kind"] != "page_hashes"])),
        "the shards hold 0 lines of page_hashes and bank.json says 1",
    ),
    "wider page hashes": (
        forged("page_hashes", lambda p: save_file({"page_hashes": torch.zeros(1, 64).byte()}, p)),
        r"'page_hashes': \('U8', \(1, 64\)\)",
    ),
    "small pages": (put("page_size", 64), "page_size: Input should be greater than or equal to 4096"),
    "large pages": (put("page_size", 1 << 21), "page_size: Input should be less than or equal to 1048576"),
    "flipped error projection": (lambda f: flipped(shard(f, "error_projections")),
        r"was changed: its sha256 is \w{16}\.\.\. and bank\.json says"),
    "text of sources only": (
        edited(
            lambda v: v.update(
                privacy={"rows": "sources", "text": True}, row_codes=0, error_variances=[], regression_features=0
            )
        ),
        "one excludes the other",
    ),
    "row codes of sources only": (put("privacy", {"rows": "sources"}), "row_codes=10 are neither none nor"),
    "missing file": (lambda f: shard(f, "directions").unlink(), r"directions-.* is missing. Download the bank again"),
    "folder as file": (as_folder, "is missing. Download the bank again"),
    "link": (linked, "is a link that leads out of the bank's folder"),
    "truncated": (truncated, r"has \d+ bytes and bank\.json says \d+\. Download the bank again"),
    "flipped bit": (lambda f: flipped(shard(f, "coordinates")),
        r"was changed: its sha256 is \w{16}\.\.\. and bank\.json says"),
    "lines": (edited(lambda v: of_kind(v, "directions").update(lines=4)), "begins at line 3 and should begin at 4"),
    "wrong order": (edited(lambda v: v["files"][0].update(first=1)), "begins at line 1 and should begin at 0"),
    "fewer rows": (edited(lambda v: v["dataset"].update(rows=9)),
        "row_codes=10 are neither none nor those of 9 identified rows"),
    "no shards": (put("files", []), "the shards hold 0 lines of directions and bank.json says 5"),
    "other shapes": (edited(lambda v: v["parameters"][0].update(shape=[2, 3])),
        r"'code_weights': \('F32', \(6,\)\).* and bank\.json says .*\(8,\)"),
    "pickle in disguise": (forged("directions", lambda p: p.write_bytes(PICKLE)),
        "sound safetensors file .its header"),
    "zip in disguise": (forged("directions", lambda p: torch.save({"directions": torch.zeros(3)}, p)),
        "is not a sound safetensors file .its header claims"),
    "text as a matrix": (
        forged("text", lambda p: save_file({"text": torch.zeros(2, 2).byte(), "offsets": torch.arange(11)}, p)),
        r"'text': \('U8', \(2, 2\)\)",
    ),
    "other offsets": (
        forged("text", lambda p: save_file({"text": torch.zeros(9).byte(), "offsets": torch.arange(10)}, p)),
        r"'offsets': \('I64', \(10,\)\)",
    ),
    "empty file": (forged("directions", header(b"", claimed=0)), "is not a sound safetensors file"),
    "8 bytes": (forged("directions", lambda p: p.write_bytes(b"12")), "is not a sound safetensors file"),
    "header beyond the file": (forged("directions", header(b"{}", claimed=1 << 62)), "its header claims"),
    "header is a list": (forged("directions", header(b"[]")), "is not a sound safetensors file"),
    "entry is a list": (forged("directions", header(b'{"directions":[]}')), "is not a sound safetensors file"),
    "data not there": (forged("directions", header((ENTRY % ("1000000000,1000000000", 4 * 10**18)).encode())),
        "overflow computing buffer size"),
    "offsets that lie": (forged("directions", header((ENTRY % (f"{K},{P}", 8)).encode(), b"\0" * 8)),
        "invalid shape, data type, or offset for tensor"),
    "negative extent": (forged("directions", header((ENTRY % ("-3,-6", BYTES)).encode(), b"\0" * BYTES)),
        "expected usize"),
    "fractional extent": (forged("directions", header((ENTRY % ("3.0,6", BYTES)).encode(), b"\0" * BYTES)),
        "expected usize"),
    "tensor twice": (forged("directions", header((ENTRY[:-1] % ("0", 0) + "," + ENTRY[1:] % ("0", 0)).encode())),
        "a key appears twice"),
    "gap": (forged("directions", header((ENTRY % ("1", 4)).replace("0,4", "1,5").encode(), b"\0" * 5)),
        "invalid offset"),
    "bytes too many": (forged("directions", header((ENTRY % ("1", 4)).encode(), b"\0" * 5)), "file not fully covered"),
    "wide header": (forged("directions", header(b'{"a":[' + b"0," * 500_000 + b"0]}")),
        "is not a sound safetensors file"),
    "long header": (forged("directions", header(b"{" + b" " * (1 << 20) + b"}")), "its header claims 1048578 bytes"),
    "overlap": (
        forged(
            "directions",
            header(
                b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
                b"\0" * 6,
            ),
        ),
        "invalid offset for tensor `b`",
    ),
    "odd metadata": (forged("directions", header(b'{"__metadata__":{"a":1}}')), "is not a sound safetensors file"),
    "unknown dtype in a shard": (
        forged("directions", header(b'{"directions":{"dtype":"C64","shape":[0],"data_offsets":[0,0]}}')),
        r"holds \{'directions': \('C64'",
    ),
    "other dtype": (forged("coordinates", lambda p: tensors(p, coordinates=torch.zeros(ROWS, K).half())),
        r"'coordinates': \('F16'"),
    "other shape": (forged("coordinates", lambda p: tensors(p, row_ids=torch.arange(ROWS + 1))),
        r"'row_ids': \('I64', \(11,"),
    "tensor missing": (forged("coordinates", lambda p: tensors(p, sources=None)), "and bank.json says"),
    "tensor too many": (forged("coordinates", lambda p: tensors(p, more=torch.zeros(1))), "'more'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_nothing_is_changed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "fwdattr"
    written_whole(folder)
    damage, message = DAMAGES[name]
    damage(folder)
    before = sorted((path.name, path.lstat().st_size) for path in folder.iterdir())
    with pytest.raises(BankError, match=message):
        ResponseBank.from_pretrained(tmp_path)
    assert sorted((path.name, path.lstat().st_size) for path in folder.iterdir()) == before


def test_every_changed_byte_of_a_shard_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    path = shard(tmp_path, "coordinates")
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(BankError, match="was changed: its sha256"):
            ResponseBank(tmp_path)
    path.write_bytes(whole)
    assert len(ResponseBank(tmp_path)) == ROWS


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("directions", lambda p: save_file({"directions": torch.full((K, P), float("nan"))}, p), "holds NaN"),
        (
            "coordinates",
            lambda p: tensors(p, coordinates=torch.full((ROWS, K), float("inf"))),
            "holds NaN or infinity",
        ),
        (
            "coordinates",
            lambda p: tensors(p, sources=torch.full((ROWS,), 2, dtype=torch.int32)),
            "sources beyond the 2",
        ),
        (
            "coordinates",
            lambda p: tensors(p, sources=torch.full((ROWS,), -2, dtype=torch.int32)),
            "sources beyond the 2",
        ),
    ],
    ids=["NaN directions", "infinite coordinates", "source beyond", "source below"],
)
def test_values_are_checked_as_they_are_read(tmp_path: Path, kind: str, change: Damage, message: str) -> None:
    """A bank may be larger than memory, so its values are not looked at when it is opened."""
    written(tmp_path)
    forged(kind, change)(tmp_path)
    bank = ResponseBank(tmp_path)
    with pytest.raises(BankError, match=message):
        bank.directions() if kind == "directions" else list(bank.coordinates())
    if "sources" in message:
        with pytest.raises(BankError, match=message):
            bank.row_labels(torch.tensor([1]))


def test_exchanged_shards_of_a_kind_are_refused(tmp_path: Path) -> None:
    """They have the same size, so that only their hashes differ; or bank.json names them in another order."""
    written(tmp_path, shard_size=2 * (4 * K + 32))
    values = json.loads((tmp_path / "bank.json").read_text())
    one, other, *_ = (tmp_path / file["name"] for file in values["files"] if file["kind"] == "coordinates")
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    one.write_bytes(contents[1]), other.write_bytes(contents[0])
    with pytest.raises(BankError, match=r"was changed: its sha256 is \w{16}\.\.\. and bank\.json says"):
        ResponseBank(tmp_path)
    one.write_bytes(contents[0]), other.write_bytes(contents[1])
    edited(lambda v: v["files"].reverse())(tmp_path)
    with pytest.raises(BankError, match=r"begins at line \d+ and should begin at 0"):
        ResponseBank(tmp_path)


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"0,", b"[[[[[[[[]]]]]]]],"])
def test_manifest_that_would_fill_memory_is_not_parsed(tmp_path: Path, unit: bytes) -> None:
    path = tmp_path / "bank.json"
    path.write_bytes(b"[" + unit * (16_000_000 // len(unit)) + b"0]")
    tracemalloc.start()
    try:
        with pytest.raises(BankError, match=r"it holds up to \d+ values; at most 1048576 are read"):
            ResponseBank(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_lying_header_allocates_nothing(tmp_path: Path) -> None:
    """A sparse file of a terabyte whose header is as long: refused after eight bytes."""
    path = tmp_path / "directions.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", (1 << 40) - 8))
        file.truncate(1 << 40)
    with pytest.raises(BankError, match="its header claims"):
        read_header(path)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """The cache keeps files in blobs/ and links to them from snapshots/, also where the cache itself is a link."""
    real = tmp_path / "disk" / "models--me--adapter"
    snapshot, blobs = real / "snapshots" / "abc" / "fwdattr", real / "blobs"
    blobs.mkdir(parents=True)
    written(snapshot)
    for path in list(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    for root in ("disk", "cache"):
        bank = ResponseBank.from_pretrained(tmp_path / root / "models--me--adapter" / "snapshots" / "abc")
        assert bank.directions().shape == (K + SOURCES, P)


def test_verification_of_hashes_can_be_left_out(tmp_path: Path) -> None:
    written(tmp_path)
    flipped(shard(tmp_path, "coordinates"))
    assert len(ResponseBank(tmp_path, verify=False)) == ROWS
    with pytest.raises(BankError):
        ResponseBank(tmp_path)


def test_inconsistent_manifest_is_not_written(tmp_path: Path) -> None:
    written(tmp_path, seed=1)
    with pytest.raises(ValueError, match="source_scales do not fit"):
        written(tmp_path, source_scales=[])
    assert ResponseBank(tmp_path).manifest.source_scales == described()["source_scales"]
    assert len(list(tmp_path.iterdir())) == FILES
