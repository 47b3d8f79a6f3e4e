"""Captured gradients on disk: read as they were written, cut back to a step, whole after a kill."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_fwdattr.bank.codes import NOISE
from hf_fwdattr.errors import BankError
from hf_fwdattr.response.captures import (
    FLOATS,
    CaptureFolder,
    Captures,
    CaptureWriter,
    bytes_per_visit,
    chosen_bits,
)
from tests.helpers.reference import agree


SIZE, ROWS, STEPS = 200, 3, 6


def gradients(step: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(ROWS, SIZE, generator=generator) * torch.logspace(-3, 0, SIZE)


def rows(step: int, number: int = 0) -> Tensor:
    return torch.arange(ROWS) + 10 * step + 3 * number


def written(path: Path, bits: int, numbers: int = 1, weighed: bool = False) -> CaptureFolder:
    """A folder with three rows a step and process."""
    folder = CaptureFolder(path / "captures", SIZE, bits)
    folder.create()
    for number in range(numbers):
        writer = CaptureWriter(folder, number, weighed)
        for step in range(STEPS):
            writer.add(step, rows(step, number), gradients(step, number))
        writer.write()
    return folder


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, FLOATS])
def test_gradients_are_read_as_they_were_written(tmp_path: Path, bits: int, weighed: bool) -> None:
    captures = Captures(written(tmp_path, bits, numbers=2, weighed=weighed))
    assert captures.steps.tolist() == [step for step in range(STEPS) for _ in range(2 * ROWS)]
    expected = torch.cat([gradients(step, number) for step in range(STEPS) for number in range(2)])
    assert torch.equal(captures.rows, torch.cat([rows(step, n) for step in range(STEPS) for n in range(2)]))
    order = torch.tensor([7, 0, 30, 7, 2])
    agree(captures.read(order), expected[order], 2e-7 if bits == FLOATS else 3 * NOISE[bits] ** 0.5)


def test_weights_keep_small_numbers(tmp_path: Path) -> None:
    """Numbers from 1e-3 to 1: without weights the rounding of the large ones is as large as the small ones."""
    errors = []
    for weighed in (False, True):
        captures = Captures(written(tmp_path / str(weighed), 4, weighed=weighed))
        read = captures.read(torch.arange(ROWS * STEPS))[:, :50]
        expected = torch.cat([gradients(step) for step in range(STEPS)])[:, :50]
        errors.append(float((read - expected).norm() / expected.norm()))
    assert errors[1] < 0.5 * errors[0]


def test_files_are_cut_back_and_go_on(tmp_path: Path) -> None:
    folder = written(tmp_path, 4, numbers=2, weighed=True)
    whole = Captures(folder).read(torch.arange(2 * ROWS * STEPS))
    folder.cut_back(4)
    assert len(Captures(folder)) == 2 * ROWS * 4
    for number in range(2):
        writer = CaptureWriter(folder, number, weighed=True)
        for step in (4, 5):
            writer.add(step, rows(step, number), gradients(step, number))
        writer.write()
    assert torch.equal(Captures(folder).read(torch.arange(2 * ROWS * STEPS)), whole)
    assert len(Captures(folder, until=3)) == 2 * ROWS * 3


@pytest.mark.parametrize("cut", [1, 37, 400])
def test_unfinished_gradients_are_no_visits(tmp_path: Path, cut: int) -> None:
    """A process that is killed leaves more of one file than of the other, or half a gradient."""
    folder = written(tmp_path, 4)
    codes = folder.file(0, "codes")
    codes.write_bytes(codes.read_bytes()[:-cut])
    kept = codes.stat().st_size // folder.code_bytes
    assert len(Captures(folder)) == kept < ROWS * STEPS
    folder.cut_back(STEPS)
    assert folder.file(0, "codes").stat().st_size == kept * folder.code_bytes
    assert folder.file(0, "steps").stat().st_size == kept * 16


def test_what_is_flushed_is_there(tmp_path: Path) -> None:
    folder = CaptureFolder(tmp_path / "captures", SIZE, 8)
    folder.create()
    writer = CaptureWriter(folder, 0)
    writer.add(0, rows(0), gradients(0))
    assert len(Captures(folder)) == 0
    writer.flush()
    assert len(Captures(folder)) == ROWS


def test_folder_is_made_empty_and_damage_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, 8)
    folder.create()
    assert len(Captures(folder)) == 0
    with pytest.raises(BankError, match=r"no captured gradients in .*captures\.json is missing"):
        CaptureFolder.open(tmp_path)
    damaged = [
        "{", "[]", '{"size": 3}', '{"size": 3, "bits": 4}', '{"size": 3, "bits": 4, "runs": [1]}',
        '{"size": -1, "bits": 4, "runs": []}', '{"size": 3, "bits": 5, "runs": []}',
    ]  # fmt: skip
    for text in damaged:
        (folder.path / "captures.json").write_text(text)
        with pytest.raises(BankError, match="no captured gradients"):
            CaptureFolder.open(folder.path)


def test_files_of_others_stay(tmp_path: Path) -> None:
    """The folder may be one that holds a model."""
    for name in ("config.json", "model.weights", "00000.bin"):
        (tmp_path / name).write_text("mine")
    folder = CaptureFolder(tmp_path, SIZE, 8)
    folder.create()
    CaptureWriter(folder, 0, weighed=True)
    folder.create()
    folder.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.bin", "config.json", "model.weights"]
    empty = written(tmp_path, 8)
    empty.remove()
    assert not empty.path.exists()


def test_folder_belongs_to_a_run_and_those_that_resumed_it(tmp_path: Path) -> None:
    folder = replace(written(tmp_path, 8), runs=(("one", 0),))
    assert folder.continues("one", STEPS)
    assert not folder.continues("other", STEPS)
    folder.resume("one", 4, "two")
    again = CaptureFolder.open(folder.path)
    assert again.runs == (("one", 0), ("two", 4))
    assert len(Captures(again)) == 4 * ROWS
    assert [again.continues(*asked) for asked in (("one", 4), ("one", 5), ("two", 6))] == [True, False, True]
    again.resume("one", 3, "three")
    assert CaptureFolder.open(folder.path).runs == (("one", 0), ("three", 3))


def test_bits_by_what_the_disk_has_room_for() -> None:
    size, free = 1 << 20, 1 << 40
    assert chosen_bits(size, 10, free) == FLOATS
    assert chosen_bits(size, 500, free) == 8
    assert chosen_bits(size, 5000, free) == 4
    for bits in (4, 2, 1):
        assert chosen_bits(size, 5000, 2 * 5000 * bytes_per_visit(size, bits)) == bits
    assert chosen_bits(size, 5000, 5000 * bytes_per_visit(size, 1)) == 0
