"""What a shard must be for its bank to be believed: where it is, its size, its hash, its header."""

from pathlib import Path

from ..errors import BankError
from .files import check_header, digest, inside
from .manifest import File, Manifest


_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check_layout(manifest: Manifest) -> None:
    """The shards that a manifest names follow each other without a gap and hold all lines.

    Raises:
        BankError: naming the file, and both values.
    """
    expected: dict[str, int] = {"probes": 0, "coordinates": 0}
    for file in manifest.files:
        inside(Path(), file.name)
        if file.first != expected[file.kind]:
            raise BankError(f"{file.name} begins at line {file.first} and should begin at {expected[file.kind]}")
        expected[file.kind] += file.lines
    width = manifest.probes + manifest.source_probes
    if expected != {"probes": width, "coordinates": manifest.lines}:
        raise BankError(
            f"the shards hold {expected['probes']} probes and {expected['coordinates']} rows; bank.json says {width} "
            f"and {manifest.lines}"
        )


def check_shard(path: Path, file: File, manifest: Manifest, verify: bool = True) -> None:
    """One file is what the manifest says; nothing is allocated for it before that.

    Args:
        verify (`bool`, defaults to `True`): its hash too.

    Raises:
        BankError: naming the file, and both values.
    """
    if path.is_symlink() and not _in_cache(path):
        raise BankError(f"{path} is a link that leads out of the bank's folder; put the file itself there")
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
    wanted = {
        "probes": {"probes": (stored, (lines, manifest.size))},
        "coordinates": {
            "coordinates": (stored, (lines, manifest.probes)), "row_ids": ("I64", (lines,)),
            "row_hashes": ("U8", (lines, 16)), "sources": ("I32", (lines,)),
        },
    }[file.kind]  # fmt: skip
    if found != wanted:
        raise BankError(f"{file.name} holds {found} and bank.json says {wanted}")


def _in_cache(path: Path) -> bool:
    """Whether a link is the kind that the Hub's cache makes: from snapshots into the blobs beside them."""
    target = path.resolve()
    return target.parent.name == "blobs" and target.parent.parent in path.parent.resolve().parents
