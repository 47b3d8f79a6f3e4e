"""The bank on disk: written tensors are read back, whole or not at all."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fwdattr.bank.bank
import hf_fwdattr.bank.tensors
from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.bank.codes import RowCodes
from hf_fwdattr.bank.files import read_header
from hf_fwdattr.bank.verification import read_manifest
from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.errors import BankError, MismatchError
from hf_fwdattr.models.parameters import TrackedParameters
from tests.helpers.cases import adapted, gpt2, llama
from tests.helpers.reference import agree


P, K, SOURCES, ROWS = 6, 3, 2, 10
TEXTS = ["a row", "", "añother — 行", "\0", "x" * 50, " y ", "\n", "{}", "last but one", "last"]
FILES = 4  # bank.json, directions of rows, directions of sources, coordinates


def described(**changes: Any) -> dict[str, Any]:
    """Return the fields of a manifest that do not follow from the tensors."""
    return {
        "libraries": {"torch": torch.__version__}, "model": "base", "revision": None, "weights": "0" * 64,
        "parameters": [{"name": "a.weight", "shape": [2, 2]}, {"name": "b.weight", "shape": [2]}],
        "objective": "causal-lm", "optimizer": "adamw", "segments": [{"length": 0.1}], "config": {},
        "curvature_samples": 4, "directions": K, "source_directions": SOURCES, "source_scales": [1.0, 2.0],
        "exact": False, "explained_variance": 0.9, "dtype": "float32", "dataset": {"rows": ROWS},
        "sources": ["one", "two"], "salt": "0" * 32,
    } | changes  # fmt: skip


def parts(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "directions": [torch.randn(K, P, generator=generator), torch.randn(SOURCES, P, generator=generator)],
        "coordinates": torch.randn(ROWS, K, generator=generator),
        "row_ids": torch.arange(ROWS) + 100,
        "row_hashes": torch.randint(0, 256, (ROWS, 16), generator=generator).to(torch.uint8),
        "sources": torch.arange(ROWS) % 3 - 1,
    }


def written(folder: Path, seed: int = 0, shard_size: int = 1 << 30, **changes: Any) -> ResponseBank:
    return write_bank(folder, BankContents(described(**changes), **parts(seed)), shard_size)


def written_with_text(folder: Path, shard_size: int = 1 << 30, **changes: Any) -> ResponseBank:
    """Write a bank that keeps its rows' text."""
    fields = described(privacy={"text": True}, **changes)
    return write_bank(folder, BankContents(fields, **parts(), texts=TEXTS), shard_size)


RESPONSES = torch.randn(ROWS, P, generator=torch.Generator().manual_seed(5))
BITS = 4
REGRESSION = {
    "weights": torch.arange(6 * K).view(6, K).bfloat16() / 4, "means": torch.arange(6) / 2, "scales": torch.ones(6),
}  # fmt: skip
PROJECTIONS = {"model.layers.0.mlp.down_proj": torch.eye(3), "lm.head": torch.tensor([[0.5, -0.25]])}


def written_whole(folder: Path, shard_size: int = 1 << 30) -> ResponseBank:
    """Write a bank that keeps everything that a bank may keep."""
    fields = described(privacy={"text": True}, averaging="trajectory", error_variances=[1.0] * K, row_code_bits=BITS)
    contents = BankContents(
        fields, **parts(), texts=TEXTS, row_codes=RowCodes.of(RESPONSES, BITS), error_projections=PROJECTIONS,
        averaged_weights=torch.arange(P) / 8, outside=torch.arange(ROWS), derivative_regression=REGRESSION,
    )  # fmt: skip
    return write_bank(folder, contents, shard_size)


def contents(bank: ResponseBank) -> dict[str, Any]:
    blocks = list(bank.coordinates())
    return {
        "directions": bank.directions(),
        "row_ids": torch.cat([ids for ids, _, _ in blocks]),
        "sources": torch.cat([sources for _, sources, _ in blocks]),
        "coordinates": torch.cat([coordinates for _, _, coordinates in blocks]),
        "row_hashes": torch.cat(list(bank.row_hashes())),
    } | ({"texts": bank.texts(range(len(bank)))} if bank.manifest.privacy.text else {})  # fmt: skip


def is_seed(bank: ResponseBank, seed: int) -> bool:
    return torch.equal(bank.directions(), torch.cat(parts(seed)["directions"]))


@pytest.mark.parametrize("shard_size", [1 << 30, 3 * 4 * P, 1])
def test_written_tensors_are_read(tmp_path: Path, shard_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_fwdattr.bank.bank, "_ROWS", 4)
    written(tmp_path, shard_size=shard_size)
    bank = ResponseBank.from_pretrained(tmp_path)
    found, expected = contents(bank), parts()
    expected["directions"] = torch.cat(expected["directions"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(bank) == ROWS
    assert len(list(tmp_path.glob("*.safetensors"))) == len(bank.manifest.files) >= (2 if shard_size > 1000 else 4)


@pytest.mark.parametrize("shard_size", [1 << 30, 3 * P, 1])
def test_row_codes_and_error_projections_are_read(
    tmp_path: Path, shard_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_fwdattr.bank.bank, "_BLOCK", 2 * P)
    written_whole(tmp_path, shard_size)
    bank = ResponseBank.from_pretrained(tmp_path)
    expected = RowCodes.of(RESPONSES, BITS).decode()
    assert torch.equal(torch.cat([block.decode() for block in bank.row_codes()]), expected)
    assert torch.equal(bank.decode_rows([9, 0, 9, 3]), expected[[9, 0, 9, 3]])
    assert {name: table.tolist() for name, table in bank.error_projections().items()} == {
        n: t.tolist() for n, t in PROJECTIONS.items()
    }
    assert bank.manifest.regression_features == 5  # and the intercepts
    regression = bank.derivative_regression()
    assert regression.keys() == REGRESSION.keys()
    assert all(torch.equal(regression[name], REGRESSION[name]) for name in REGRESSION)
    assert bank.manifest.row_codes == ROWS
    assert bank.outside().tolist() == list(range(ROWS))
    ids, sources = bank.row_labels(torch.tensor([7, 0]))
    assert ids.tolist() == [107, 100]
    assert sources.tolist() == [0, -1]
    with pytest.raises(BankError, match="keeps no code of row 10"):
        bank.decode_rows([0, 10])
    copied = ResponseBank(bank.save_pretrained(tmp_path / "copy"))
    assert torch.equal(copied.decode_rows([4]), expected[[4]])
    without = written(tmp_path / "without")
    assert not list(without.row_codes())
    assert without.error_projections() == {}
    assert without.derivative_regression() == {}
    assert without.outside().tolist() == []


@pytest.mark.parametrize("shard_size", [1 << 30, 3 * P, 1])
def test_numbers_in_8_bits_are_off_by_little(tmp_path: Path, shard_size: int) -> None:
    bank = written(tmp_path, shard_size=shard_size, dtype="int8", coordinates_dtype="int8")
    found, expected = contents(bank), parts()
    expected["directions"] = torch.cat(expected["directions"])
    off = found["coordinates"] - expected["coordinates"]
    stored, scales = (torch.cat(part) for part in zip(*bank.stored_coordinates(), strict=True))
    assert stored.abs().amax(1).tolist() == [127] * ROWS  # the whole range is used
    steps = scales[:, None] * torch.tensor(bank.manifest.coordinate_scales)
    assert 0 < float((off.abs() / steps).max()) <= 0.501
    assert 0 < float((found["directions"] - expected["directions"]).norm() / expected["directions"].norm()) < 0.02
    assert torch.equal(bank.directions(lines=slice(1, 4)), found["directions"][1:4])
    header = read_header(bank.path(bank.manifest.files_of("coordinates")[0]))
    assert header["coordinates"][0] == "I8"


def test_directions_that_are_rows_take_one_coordinate_each(tmp_path: Path) -> None:
    changed = parts() | {"coordinates": torch.arange(1.0, K + 1)[:, None]}
    changed |= {name: changed[name][:K] for name in ("row_ids", "row_hashes", "sources")}
    fields = described(exact=True, dataset={"rows": K})
    bank = write_bank(tmp_path, BankContents(fields, **changed), 1)
    assert torch.equal(contents(bank)["coordinates"], torch.arange(1.0, K + 1).diag())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_as_such_and_read_as_float32(tmp_path: Path, dtype: str) -> None:
    bank = written(tmp_path, dtype=dtype, coordinates_dtype=dtype)
    found = contents(bank)
    assert found["coordinates"].dtype == found["directions"].dtype == torch.float32
    assert torch.equal(found["coordinates"], parts()["coordinates"].to(getattr(torch, dtype)).float())
    agree(found["directions"], torch.cat(parts()["directions"]), 1e-2)


def test_model_folder_and_bank_folder_both_open(tmp_path: Path) -> None:
    written(tmp_path / "model" / "fwdattr")
    one, other = ResponseBank.from_pretrained(tmp_path / "model"), ResponseBank(tmp_path / "model" / "fwdattr")
    assert one.manifest == other.manifest
    written(tmp_path / "model" / "elsewhere", seed=1)
    assert is_seed(ResponseBank.from_pretrained(str(tmp_path / "model"), subfolder="elsewhere"), 1)
    with pytest.raises(BankError, match=r"no bank in .*nothing"):
        ResponseBank.from_pretrained(tmp_path / "nothing")


def test_saved_copy_equals_the_bank(tmp_path: Path) -> None:
    bank = written(tmp_path / "a")
    written(tmp_path / "b" / "fwdattr", seed=1)
    target = bank.save_pretrained(tmp_path / "b")
    copy = ResponseBank.from_pretrained(tmp_path / "b")
    assert target == copy.folder
    assert copy.manifest == bank.manifest
    assert is_seed(copy, 0)
    assert len(list(target.iterdir())) == FILES
    assert copy.save_pretrained(tmp_path / "b") == target  # onto itself
    assert is_seed(ResponseBank(target), 0)


def test_measured_quality_is_noted_in_the_manifest(tmp_path: Path) -> None:
    bank = written(tmp_path)
    bank.note_quality(lds=0.85)
    bank.note_quality(recall="9 of 10")
    assert ResponseBank(tmp_path).manifest == bank.manifest
    assert bank.manifest.quality == {"lds": 0.85, "recall": "9 of 10"}


def test_writing_removes_only_old_shards(tmp_path: Path) -> None:
    folder = tmp_path / "fwdattr"
    written(folder)
    mine = ["notes.txt", "README.md", "directions-00000000-x.txt", ".gitattributes", "LICENSE"]
    for name in mine:
        (folder / name).write_text("mine")
    (folder / ".partial-killed").write_text("half")
    (folder / "directions-0123abcd-00000.safetensors").write_text("of a run that was killed")
    bank = written(folder, seed=1)
    ours = {"bank.json", *(file.name for file in bank.manifest.files)}
    assert {path.name for path in folder.iterdir()} == ours | set(mine)
    assert {(folder / name).read_text() for name in mine} == {"mine"}


@pytest.mark.parametrize("name", ["mine.safetensors", "directions-best.safetensors", "weights.pkl", "run.py", "data"])
def test_bank_is_not_written_beside_unknown_files(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        BankError,
        match=f"holds '{name}', which bank.json does not name. It could be taken for a part of the bank. Move it away",
    ):
        written(tmp_path, seed=1)
    (tmp_path / name).rename(tmp_path.parent / "elsewhere")
    assert is_seed(ResponseBank(tmp_path), 0)


def test_bank_may_share_a_folder_with_a_model(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin"):
        (tmp_path / name).write_text("a model's")
    written(tmp_path)
    assert is_seed(ResponseBank.from_pretrained(tmp_path), 0)


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("old", [False, True])
def test_failed_write_leaves_the_old_bank_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, old: bool
) -> None:
    """Every call that touches the disk fails in turn, from the first to the last."""
    if old:
        written(tmp_path, seed=1)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "chmod")} | {
        "save_file": hf_fwdattr.bank.tensors.save_file
    }
    for step in range(100):
        left = [step]

        def failing(name: str, left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise error
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "chmod"):
                patch.setattr(os, name, failing(name))
            patch.setattr(hf_fwdattr.bank.tensors, "save_file", failing("save_file"))
            with suppress(type(error)):
                written(tmp_path, shard_size=4 * P * 3)
                break
        if (tmp_path / "bank.json").exists():
            bank = ResponseBank(tmp_path)
            assert is_seed(bank, 1 if old else 0) or is_seed(bank, 0)
            complete = is_seed(bank, 0)
            assert {path.name for path in tmp_path.iterdir()} >= {file.name for file in bank.manifest.files}
            if complete:  # only the sync of the folder failed, after everything was in place
                written(tmp_path, seed=1)
        else:
            assert not old
            assert list(tmp_path.iterdir()) == []
    assert 15 < step < 99
    assert is_seed(ResponseBank(tmp_path), 0)


WRITER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from contextlib import suppress
from pathlib import Path
from tests.bank.test_bank import written
for number in range({kills}):
    folder = Path(sys.argv[1]) / str(number)
    written(folder)
    child = os.fork()
    seed = 1
    while child == 0:
        written(folder, seed=seed, shard_size=1)
        seed += 1
    time.sleep(0.003 + 0.0071 * number)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_process_leaves_a_bank_that_loads(tmp_path: Path) -> None:
    """A process that writes one bank after the other is killed at twelve different times."""
    kills = 12
    script = WRITER.format(root=str(Path(__file__).parents[2]), kills=kills)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    left = 0
    for number in range(kills):
        folder = tmp_path / str(number)
        bank = ResponseBank(folder)
        assert any(is_seed(bank, seed) for seed in range(200))
        left += len(list(folder.iterdir())) - 1 - len(bank.manifest.files)
        bank = written(folder, seed=2)
        assert len(list(folder.iterdir())) == 1 + len(bank.manifest.files)
    assert left > 0, "no process was killed in the middle of its work"


def test_nan_is_not_written(tmp_path: Path) -> None:
    written(tmp_path, seed=1)
    for name in ("directions", "coordinates"):
        bad = parts()
        (bad[name][1] if name == "directions" else bad[name])[0, 0] = float("nan")
        with pytest.raises(BankError, match="holds NaN or infinity"):
            write_bank(tmp_path, BankContents(described(), **bad))
    huge = parts() | {"coordinates": torch.full((ROWS, K), 1e6)}
    with pytest.raises(BankError, match="a coordinate in float16 holds NaN or infinity"):
        write_bank(tmp_path, BankContents(described(coordinates_dtype="float16"), **huge))
    assert is_seed(ResponseBank(tmp_path), 1)
    assert len(list(tmp_path.iterdir())) == FILES


def belonging(folder: Path, model: Any) -> ResponseBank:
    """Write a bank that belongs to a model."""
    parameters = TrackedParameters.of(model)
    shapes = [{"name": n, "shape": list(s)} for n, s in zip(parameters.names, parameters.shapes, strict=True)]
    tensors = parts() | {"directions": [torch.zeros(K, parameters.size), torch.zeros(SOURCES, parameters.size)]}
    fields = described(parameters=shapes, weights=parameters.fingerprint(model))
    return write_bank(folder, BankContents(fields, **tensors))


def test_bank_recognises_its_model_in_every_wrapper(tmp_path: Path) -> None:
    model = adapted(gpt2())
    bank = belonging(tmp_path, model)
    assert bank.check_model(model).names == TrackedParameters.of(model).names
    assert bank.check_model(model.base_model.model).live[0].startswith("transformer.")
    assert bank.check_model(torch.nn.parallel.DataParallel(model)).names == TrackedParameters.of(model).names


def test_other_model_is_refused_by_name_shape_and_weights(tmp_path: Path) -> None:
    model = adapted(gpt2())
    bank = belonging(tmp_path, model)
    with pytest.raises(MismatchError, match=r"c_attn\.lora_B\.weight, are not in this model\. .*made for \(base\)"):
        bank.check_model(adapted(llama()))
    with pytest.raises(MismatchError, match=r"has shape \(36, 2\) in the bank and \(36, 3\) in the model"):
        bank.check_model(adapted(gpt2(), r=3))
    with pytest.raises(MismatchError, match=r"has shape .* in the bank and is not in the model"):
        bank.check_model(adapted(gpt2(), target_modules=["c_attn"]))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).view(-1)[0] += 1e-6
    with pytest.raises(MismatchError, match=r"sha256 [0-9a-f]{16}\.\.\. and the model's tracked weights have"):
        bank.check_model(model)


def test_row_hashes_are_compared_one_by_one(tmp_path: Path) -> None:
    bank = written(tmp_path, shard_size=1)
    own = [bytes(line.tolist()) for line in parts()["row_hashes"]]
    bank.check_rows(own)
    with pytest.raises(MismatchError, match="the bank has 10 rows and the dataset 9"):
        bank.check_rows(own[:-1])
    with pytest.raises(MismatchError, match=f"row 3 of the dataset .*token hash {own[4].hex()}, bank {own[3].hex()}"):
        bank.check_rows([*own[:3], own[4], own[3], *own[5:]])


def test_manifest_is_readable_text(tmp_path: Path) -> None:
    bank = written(tmp_path)
    assert read_manifest(tmp_path) == bank.manifest
    text = (tmp_path / "bank.json").read_text()
    assert text.endswith("}\n")
    assert '"rows": 10' in text
    assert bank.manifest.size == P
    assert (tmp_path / "bank.json").stat().st_mode & 0o777 == 0o644
