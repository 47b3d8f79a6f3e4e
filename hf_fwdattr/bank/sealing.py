"""The checksum of a `bank.json`."""

import hashlib
import json
from typing import Any


__all__ = ["checksum", "sealed"]


def checksum(values: dict[str, Any]) -> str:
    """Return the sha256 of a `bank.json`'s content: its values without `checksum`, keys sorted, no white space."""
    content = {name: value for name, value in values.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(values: dict[str, Any]) -> bytes:
    """Return the text of a `bank.json` with these values and their checksum."""
    content = values | {"checksum": checksum(values)}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
