"""Measured quality of a bank, written into its `bank.json` and its model's card."""

import math
from pathlib import Path
from typing import Any

from .card import repository_in, with_section
from .files import write_atomically
from .schema import Manifest
from .verification import MANIFEST, read_manifest


__all__ = ["add_quality"]


def add_quality(folder: str | Path, measured: dict[str, Any]) -> Manifest:
    """Add figures to `quality` in the `bank.json` of a bank's folder; those of other names stay.

    The file is replaced as a whole or not at all. A card in the folder above that has the bank's section shows them
    too.

    Args:
        folder (`str` or `Path`): the bank's own folder.
        measured (`dict`): name -> a number, a text, or a flat dictionary of them.

    Raises:
        BankError: there is no bank.
        ValueError: a value that JSON cannot hold, such as NaN.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _refuse_nan(measured, "quality")
    manifest = manifest.model_copy(update={"quality": manifest.quality | measured})
    write_atomically(folder / MANIFEST, manifest.to_json())
    card = folder.parent / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if (repository := repository_in(text)) is not None:
            write_atomically(card, with_section(text, manifest, repository, subfolder=folder.name).encode())
    return manifest


def _refuse_nan(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_nan(inner, f"{where}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}={value}: not a finite number, so the measurement went wrong. Nothing was written")
    elif not isinstance(value, str | int | float):
        raise ValueError(f"{where}={value!r}: not a number, a text or a dictionary of them. Nothing was written")
