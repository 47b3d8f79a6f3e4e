"""Verification of a bank: `bank.json` against its own checksum, every shard against `bank.json`.

Nothing of a shard is allocated before its size, hash and header agree.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import BankError
from .files import Header, inside, read_header, refuse_link, sha256_of, unique_json
from .schema import SCHEMA_VERSION, SHARD_KINDS, SHARD_PATTERN, Manifest, Pointer, ShardFile, checksum


__all__ = [
    "LARGEST_MANIFEST", "MANIFEST", "check_header", "check_layout", "check_shard", "names_in", "read_manifest",
    "read_pointer", "refuse_unknown_files", "remove_stale",
]  # fmt: skip
MANIFEST = "bank.json"
LARGEST_MANIFEST = 1 << 26  # bytes

_HARMLESS = re.compile(r"\..+|.+\.(?:md|txt)|LICENSE|NOTICE")
_MODEL_FILES = {"config.json", "adapter_config.json"}


def read_manifest(folder: Path) -> Manifest:
    """Read and verify the manifest of the bank in `folder`.

    Raises:
        BankError: there is none, it is damaged, or a field is missing, unknown or of the wrong type.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BankError(f"no bank in {folder}: there is no {MANIFEST}. Name the folder of a model that has a bank")
    values = _read(path)
    if "bank_repo" in values:
        raise BankError(
            f"{path} only points to a bank, in {values['bank_repo']!r}. A pointer cannot lead to another pointer. "
            "Name the repository that holds the bank"
        )
    return _parse(path, values, Manifest)


def read_pointer(path: Path) -> Pointer | None:
    """Read and verify the pointer in a `bank.json`; return None if it is a bank's own manifest.

    Raises:
        BankError: it is damaged, or a pointer with a field that is missing, unknown or of the wrong type.
    """
    values = _read(path)
    return _parse(path, values, Pointer) if "bank_repo" in values else None


def _read(path: Path) -> dict[str, Any]:
    """Return the fields of a `bank.json` whose schema version and checksum are right."""
    refuse_link(path)
    size = path.stat().st_size
    if size > LARGEST_MANIFEST:
        raise BankError(f"{path} has {size} bytes. A manifest has at most {LARGEST_MANIFEST}. Download the bank again")
    try:
        values = unique_json(path.read_bytes())
        expected = checksum(values) if isinstance(values, dict) else ""
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is not sound JSON ({error}). Download the bank again") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if type(version) is int and version == 1:
        raise BankError(
            f"{path}: schema_version is 1, of an earlier development version of hf-fwdattr. Build the bank again from "
            "its record, with build_bank(record=...), or train again"
        )
    if not isinstance(values, dict) or type(version) is not int or version != SCHEMA_VERSION:
        raise BankError(
            f"{path}: schema_version is {version!r} and this package reads {SCHEMA_VERSION}. Update hf-fwdattr"
        )
    stated = values.pop("checksum", None)
    if stated != expected:
        raise BankError(
            f"{path}: checksum is {str(stated)[:16]!r} and its content has {expected[:16]!r}. The file was changed or "
            "damaged. Download the bank again, or build it again"
        )
    return values


def _parse(path: Path, values: dict[str, Any], document: type[Any]) -> Any:
    try:
        return document.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BankError(
            f"{path}: {field}: {first['msg']} (found {str(first.get('input'))[:80]!r}). Build the bank again"
        ) from error


def check_layout(manifest: Manifest) -> None:
    """Check that the shards that a manifest names follow each other without a gap and hold all lines.

    Raises:
        BankError: naming the file, and both values.
    """
    lines = dict.fromkeys(SHARD_KINDS, 0)
    for file in manifest.files:
        inside(Path(), file.name)
        if file.first != lines[file.kind]:
            raise BankError(
                f"{file.name} begins at line {file.first} and should begin at {lines[file.kind]}. Build the bank again"
            )
        lines[file.kind] += file.lines
    for name, kind in SHARD_KINDS.items():
        if lines[name] != kind.lines(manifest):
            raise BankError(
                f"the shards hold {lines[name]} lines of {name} and bank.json says {kind.lines(manifest)}. Build the "
                "bank again"
            )


def check_shard(path: Path, file: ShardFile, manifest: Manifest, verify: bool = True) -> None:
    """Check that a shard on disk is what the manifest says.

    Args:
        verify (`bool`, defaults to `True`): compare its sha256 too.

    Raises:
        BankError: naming the file, and both values.
    """
    refuse_link(path)
    if not path.is_file():
        raise BankError(f"{path} is missing. Download the bank again")
    size = path.stat().st_size
    if size != file.size:
        raise BankError(f"{path} has {size} bytes and bank.json says {file.size}. Download the bank again")
    if verify and (digest := sha256_of(path)) != file.sha256:
        raise BankError(
            f"{path} was changed: its sha256 is {digest[:16]}... and bank.json says {file.sha256[:16]}.... Download "
            "the bank again"
        )
    check_header(read_header(path), file, manifest)


def check_header(header: Header, file: ShardFile, manifest: Manifest) -> None:
    """Compare dtype and shape of every tensor in a shard with what the manifest says.

    Raises:
        BankError: naming the file, and both values.
    """
    expected = SHARD_KINDS[file.kind].tensors(manifest, file.lines)
    fits = header.keys() == expected.keys() and all(
        dtype == expected[name][0]
        and len(shape) == len(expected[name][1])
        and all(wanted in (None, extent) for extent, wanted in zip(shape, expected[name][1], strict=True))
        for name, (dtype, shape) in header.items()
    )
    if not fits:
        raise BankError(f"{file.name} holds {header} and bank.json says {expected}. Build the bank again")


def refuse_unknown_files(names: Iterable[str], listed: Iterable[str], where: object) -> None:
    """Refuse files in a bank's own folder that `bank.json` does not list.

    Left alone are shards of a bank that is being written or was replaced, hidden files, Markdown, plain text and
    licences, and everything in a folder that is a model's as well. None of it is ever read.

    Raises:
        BankError: naming the first.
    """
    present = set(names)
    if present & _MODEL_FILES:
        return
    for name in sorted(present - set(listed)):
        if not SHARD_PATTERN.fullmatch(name) and not _HARMLESS.fullmatch(name):
            raise BankError(
                f"{where} holds {name!r}, which bank.json does not name. It could be taken for a part of the bank. "
                "Move it away, and see who put it there"
            )


def names_in(folder: Path) -> list[str]:
    """Return the names of everything in a folder except its sub-folders."""
    return [path.name for path in folder.iterdir() if path.is_symlink() or not path.is_dir()]


def remove_stale(folder: Path, current: Iterable[str]) -> None:
    """Remove shards of earlier banks, and unfinished files of killed runs."""
    kept = set(current)
    for path in folder.iterdir():
        if SHARD_PATTERN.fullmatch(path.name) and path.name not in kept:
            path.unlink(missing_ok=True)
