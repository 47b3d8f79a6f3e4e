"""What a shard must be for its bank to be believed: where it is, its size, its hash, its header."""

from pathlib import Path

from ..errors import BankError
from ..quantised import stretches
from .files import check_header, digest, inside, no_link
from .manifest import File, Manifest


KINDS = ("probes", "coordinates", "text", "responses", "maps", "kernel", "weights")
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check_layout(manifest: Manifest) -> None:
    """The shards that a manifest names follow each other without a gap and hold all lines.

    Raises:
        BankError: naming the file, and both values.
    """
    expected: dict[str, int] = dict.fromkeys(KINDS, 0)
    for file in manifest.files:
        inside(Path(), file.name)
        if file.first != expected[file.kind]:
            raise BankError(f"{file.name} begins at line {file.first} and should begin at {expected[file.kind]}")
        expected[file.kind] += file.lines
    width, texts = manifest.probes + manifest.source_probes, manifest.dataset.rows if manifest.privacy.text else 0
    said = {
        "probes": width, "coordinates": manifest.lines, "text": texts, "responses": manifest.responses,
        "maps": len(manifest.maps), "weights": int(manifest.ends == "mean"),
        "kernel": manifest.responses if manifest.kernel else 0,
    }  # fmt: skip
    for kind, lines in expected.items():
        if lines != said[kind]:
            raise BankError(f"the shards hold {lines} lines of {kind} and bank.json says {said[kind]}")


def check_shard(path: Path, file: File, manifest: Manifest, verify: bool = True) -> None:
    """One file is what the manifest says; nothing is allocated for it before that.

    Args:
        verify (`bool`, defaults to `True`): its hash too.

    Raises:
        BankError: naming the file, and both values.
    """
    no_link(path)
    if not path.is_file():
        raise BankError(f"{path} is missing; download the bank again")
    size = path.stat().st_size
    if size != file.size:
        raise BankError(f"{path} has {size} bytes and bank.json says {file.size}; download the bank again")
    if verify and digest(path) != file.sha256:
        raise BankError(f"{path} was changed: its sha256 is not {file.sha256[:16]}... as bank.json says")
    check_table(check_header(path), file, manifest)


def check_table(found: dict[str, tuple[str, tuple[int, ...]]], file: File, manifest: Manifest) -> None:
    """dtype and shape of every tensor in a shard against the manifest's.

    Raises:
        BankError: naming the file, and both values.
    """
    lines, stored = file.lines, _STORED[manifest.dtype]
    letters = found.get("text", ("", ()))[1]  # as many as there are; the file's length was compared
    tables: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "probes": {"probes": (stored, (lines, manifest.size))},
        "coordinates": {
            "coordinates": (stored, (lines, manifest.probes)), "row_ids": ("I64", (lines,)),
            "row_hashes": ("U8", (lines, 16)), "sources": ("I32", (lines,)),
        },
        "responses": {
            "responses": ("I8", (lines, manifest.size)), "steps": ("F32", (lines, stretches(manifest.size))),
        },
        "maps": {table.name: ("F16", tuple(table.shape)) for table in manifest.maps},
        "kernel": {"kernel": ("F16", (manifest.responses, manifest.responses))},
        "weights": {"weights": ("F32", (manifest.size,))},
        "text": {"text": ("U8", letters if len(letters) == 1 else (0,)), "offsets": ("I64", (lines + 1,))},
    }  # fmt: skip
    wanted = tables[file.kind]
    if found != wanted:
        raise BankError(f"{file.name} holds {found} and bank.json says {wanted}")
