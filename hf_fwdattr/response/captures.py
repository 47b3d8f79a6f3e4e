"""Captured gradients on disk: per-row gradients of the training steps themselves, in a few bits a number.

Two files for each process that trains: `NNNNN.steps` holds step and row of every visit (a row in a step), and
`NNNNN.codes` its gradient of the training loss as a row code, or in plain floats where there is room. Both only grow,
visits in the order of their steps: a run that resumes cuts them back to its checkpoint's step.

Under Adam a step divides a number by its usual size, so numbers are weighed by the root of that before they are coded:
otherwise the rounding of large ones would drown the small ones. `NNNNN.weights` holds those of a process, float32.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ..bank.codes import RowCodes
from ..bank.files import write_atomically
from ..bank.schema import BITS, code_blocks
from ..errors import BankError


__all__ = ["FLOATS", "CaptureFolder", "CaptureWriter", "Captures", "bytes_per_visit", "chosen_bits"]

FLOATS = 32  # bits of a number that is not coded
_VISIT = np.dtype([("step", "<i8"), ("row", "<i8")])
_SETTINGS, _SUFFIXES = "captures.json", (".steps", ".codes", ".weights")
# Bytes up to which gradients are kept in floats, and in 8 bits: scores of 4 bits are as good (LDS, README).
_MOST_IN_FLOATS, _MOST_IN_8_BITS = 256 << 20, 1 << 30
# Of the mean over numbers: below it, a number counts as if it were so large. Not less, as what is still small in the
# first gradients (LoRA's A, while B is zero) may be as large as the rest later.
_LEAST_SQUARE = 1e-2
_HELD = 8 << 20  # bytes of gradients that wait to be coded together


def bytes_per_visit(size: int, bits: int) -> int:
    """Return the bytes of one captured gradient of `size` numbers."""
    if bits == FLOATS:
        return 4 * size + _VISIT.itemsize
    count, block = code_blocks(size)
    return count * (block * bits // 8 + 4) + _VISIT.itemsize


@dataclass(frozen=True)
class CaptureFolder:
    """A folder with the captured gradients of a run.

    Attributes:
        path (`Path`): the folder.
        size (`int`): P.
        bits (`int`): of a number: 1, 2, 4, 8, or `FLOATS`.
        runs (`tuple`): name of each run that wrote here, and its first step: a run, and those that resumed it.
    """

    path: Path
    size: int
    bits: int
    runs: tuple[tuple[str, int], ...] = (("", 0),)

    def create(self) -> None:
        """Make the folder, or empty it; files of others stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_files()
        self._write_settings()

    def remove(self) -> None:
        """Remove the files, and the folder if it is then empty."""
        self._remove_files()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def continues(self, run: str, taken: int) -> bool:
        """Return whether the first `taken` steps in here are those of a run."""
        for (name, _), (_, following) in zip(self.runs, (*self.runs[1:], ("", taken)), strict=True):
            if name == run:
                return taken <= following
        return False

    def resume(self, run: str, taken: int, new: str) -> None:
        """Cut back to the first `taken` steps of a run, which `new` goes on from."""
        self.cut_back(taken)
        names = [name for name, _ in self.runs]
        replace(self, runs=(*self.runs[: names.index(run) + 1], (new, taken)))._write_settings()

    def _remove_files(self) -> None:
        files = [file for file in self.path.glob("*") if file.stem.isdecimal() and file.suffix in _SUFFIXES]
        for file in (*files, self.path / _SETTINGS):
            file.unlink(missing_ok=True)

    def _write_settings(self) -> None:
        values = {"size": self.size, "bits": self.bits, "runs": self.runs}
        write_atomically(self.path / _SETTINGS, json.dumps(values).encode())

    @classmethod
    def open(cls, path: Path) -> "CaptureFolder":
        """Read the settings of a folder that `create` made.

        Raises:
            BankError: there is none, or its settings are damaged.
        """
        try:
            values = json.loads((path / _SETTINGS).read_text())
            size, bits = values["size"], values["bits"]
            runs = tuple((str(name), int(step)) for name, step in values["runs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BankError(f"no captured gradients in {path}: {_SETTINGS} is missing or damaged") from error
        if type(size) is not int or size < 1 or bits not in (*BITS, FLOATS):
            raise BankError(f"no captured gradients in {path}: size {size!r} and bits {bits!r} in {_SETTINGS}")
        return cls(path, size, bits, runs)

    @property
    def code_bytes(self) -> int:
        """Bytes of one gradient."""
        return bytes_per_visit(self.size, self.bits) - _VISIT.itemsize

    def numbers(self) -> list[int]:
        """Return the numbers of the processes that wrote files, ascending."""
        return sorted(int(file.stem) for file in self.path.glob("*.steps") if file.stem.isdecimal())

    def file(self, number: int, kind: str) -> Path:
        """Return the path of a process's file, `steps` or `codes`."""
        return self.path / f"{number:05d}.{kind}"

    def weights(self, number: int) -> Tensor | None:
        """Return the weights (P,) of a process's codes, if it weighs them."""
        path = self.file(number, "weights")
        return torch.from_numpy(np.fromfile(path, dtype="<f4")) if path.is_file() else None

    def visits(self, number: int) -> np.ndarray:
        """Return step and row of a process's visits, as far as their gradients are on disk whole."""
        visits = np.fromfile(self.file(number, "steps"), dtype=_VISIT)
        codes = self.file(number, "codes")
        whole = codes.stat().st_size // self.code_bytes if codes.is_file() else 0
        return visits[:whole]

    def cut_back(self, step: int) -> None:
        """Drop all visits from `step` on, and whatever an interrupted process left unfinished."""
        for number in self.numbers():
            visits = self.visits(number)
            kept = int(np.searchsorted(visits["step"], step))
            os.truncate(self.file(number, "steps"), kept * _VISIT.itemsize)
            os.truncate(self.file(number, "codes"), kept * self.code_bytes)


class CaptureWriter:
    """Appends gradients to this process's files; they are coded some at a time.

    Args:
        folder (`CaptureFolder`): made by `create`.
        number (`int`): of the process.
        weighed (`bool`): whether numbers are weighed, by the gradients that come first.

    Raises:
        OSError: the disk is full, at any call.
    """

    def __init__(self, folder: CaptureFolder, number: int, weighed: bool = False):
        self.folder, self._number, self._weighed = folder, number, weighed
        self._weights = folder.weights(number)
        self._codes, self._steps = (folder.file(number, kind) for kind in ("codes", "steps"))
        for path in (self._codes, self._steps):
            _append(path, b"")
        self._visits: list[np.ndarray] = []
        self._gradients: list[Tensor] = []
        self._held = 0

    def add(self, step: int, rows: Tensor, gradients: Tensor) -> None:
        """Append the gradients (n, P) that a step took of rows (n,)."""
        visits = np.empty(len(rows), _VISIT)
        visits["step"], visits["row"] = step, rows.numpy()
        self._visits.append(visits)
        self._gradients.append(gradients.float())
        self._held += 4 * gradients.numel()
        if self._held >= _HELD:
            self.write()

    def flush(self) -> None:
        """Have everything on the disk itself, so that neither a kill nor a power cut loses it."""
        self.write()
        for path in (self._codes, self._steps):
            _append(path, b"", synchronized=True)

    def write(self) -> None:
        """Write what is held."""
        if not self._visits:
            return
        gradients, visits = torch.cat(self._gradients), np.concatenate(self._visits)
        self._gradients, self._visits, self._held = [], [], 0
        if self.folder.bits == FLOATS:
            _append(self._codes, np.ascontiguousarray(gradients.numpy(), dtype="<f4").tobytes())
        else:
            codes = RowCodes.of(gradients, self.folder.bits, self._weights_of(gradients))
            scales = codes.scales.numpy().astype("<f4").view(np.uint8)
            _append(self._codes, np.concatenate([scales, codes.codes.numpy()], 1).tobytes())
        _append(self._steps, visits.tobytes())  # after the codes, as it says how many there are

    def _weights_of(self, gradients: Tensor) -> Tensor | None:
        """Return the weights of all codes: one over the root of a number's usual size, about one on average."""
        if self._weighed and self._weights is None and bool(gradients.any()):
            squares = gradients.double().square().mean(0)
            weights = (squares + _LEAST_SQUARE * squares.mean()).pow(-0.25)
            self._weights = (weights / weights.log().mean().exp()).float()
            path = self.folder.file(self._number, "weights")
            write_atomically(path, self._weights.numpy().astype("<f4").tobytes())
        return self._weights


class Captures:
    """Reader of a run's captured gradients; a context.

    Visits of all processes are one list, in the order of steps, and of processes within a step.

    Args:
        folder (`CaptureFolder`): after training.
        until (`int`, *optional*): the first step that is left out.

    Attributes:
        steps, rows (`Tensor`): (visits,) int64.
    """

    def __init__(self, folder: CaptureFolder, until: int | None = None):
        self.folder = folder
        parts = [folder.visits(number) for number in folder.numbers()]
        if until is not None:
            parts = [part[part["step"] < until] for part in parts]
        visits = np.concatenate([np.empty(0, _VISIT), *parts])
        file = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        line = np.concatenate([np.empty(0, np.int64), *(np.arange(len(part)) for part in parts)])
        order = np.argsort(visits["step"], kind="stable")
        self.steps, self.rows = (torch.from_numpy(visits[name][order].copy()) for name in ("step", "row"))
        self._file, self._line = file[order], line[order]
        self._maps = [self._map(number, len(part)) for number, part in zip(folder.numbers(), parts, strict=True)]
        self._weights = [folder.weights(number) for number in folder.numbers()]

    def __len__(self) -> int:
        return len(self.steps)

    def __enter__(self) -> "Captures":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._maps = []

    def read(self, visits: Tensor) -> Tensor:
        """Return the gradients (n, P) of visits (n,), float32."""
        gradients = torch.empty(len(visits), self.folder.size)
        for file, mapped in enumerate(self._maps):
            own = self._file[visits.numpy()] == file
            if own.any():
                lines = self._line[visits.numpy()[own]]
                gradients[torch.from_numpy(own)] = self._decode(mapped[lines], self._weights[file])
        return gradients

    def _decode(self, found: np.ndarray, weights: Tensor | None) -> Tensor:
        """Return gradients (n, P) of records (n, bytes)."""
        size, bits = self.folder.size, self.folder.bits
        if bits == FLOATS:
            return torch.from_numpy(found.view("<f4"))
        count, _ = code_blocks(size)
        scales = np.ascontiguousarray(found[:, : 4 * count]).view("<f4")
        codes = np.ascontiguousarray(found[:, 4 * count :])
        return RowCodes(torch.from_numpy(codes), torch.from_numpy(scales), bits, size, weights).decode()

    def _map(self, number: int, count: int) -> np.ndarray:
        path = self.folder.file(number, "codes")
        shape = (count, self.folder.code_bytes)
        return np.memmap(path, np.uint8, "r", shape=shape) if count else np.empty(shape, np.uint8)


def _append(path: Path, data: bytes, synchronized: bool = False) -> None:
    """Append to a file, which is not held open; `synchronized` waits until the disk has it."""
    with path.open("ab") as file:
        file.write(data)
        if synchronized:
            file.flush()
            os.fsync(file.fileno())


def chosen_bits(size: int, visits: int, free: int) -> int:
    """Return the bits of a number with which so many gradients are captured; 0 where the disk has no room.

    Args:
        size (`int`): P.
        visits (`int`): rows times epochs.
        free (`int`): bytes that are free on the disk; half of them are left alone.
    """
    for bits, most in ((FLOATS, _MOST_IN_FLOATS), (8, _MOST_IN_8_BITS), (4, math.inf), (2, math.inf), (1, math.inf)):
        if bytes_per_visit(size, bits) * visits <= min(most, free / 2):
            return bits
    return 0
