"""Output of the commands: text that no terminal or encoding chokes on, and JSON that every parser reads."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..bank.printable import printable


__all__ = ["command_words", "echo", "replace_unencodable", "write_json"]

# Names of Python's options in messages, and how the command line spells them.
_WORDS = (
    (r"allow_mismatch=\[?'(\w+)'\]?", r"--allow-mismatch \1"),
    (r"\bverify_dataset=False\b", "--no-verify"),
    (r"\b(budget|readout|precision)='(\w+)'", r"--\1 \2"),
    (r"\b(top_k|max_new_tokens|budget|readout|precision|temperature|seed)=", lambda match: _option(match[1])),
    (r"\bdataset=", "--dataset "),
)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-") + " "


def command_words(message: str) -> str:
    """Return a message with the options of Python's functions in the command line's spelling."""
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message


def replace_unencodable() -> None:
    """Let standard output and error replace what their encoding lacks (ascii, cp1252) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def echo(text: object, err: bool = False) -> None:
    """Print a line without control characters, to standard output or error."""
    print(printable(text, lines=True), file=sys.stderr if err else sys.stdout, flush=True)


def write_json(value: Any) -> None:
    """Write one JSON object to standard output: ASCII, which is UTF-8 too; null for numbers that are not finite."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    sys.stdout.write(text.replace("\x7f", "\\u007f") + "\n")


def _plain(value: Any) -> Any:
    """Return a value of JSON: lone surrogates are replaced, numbers of NumPy and torch are numbers, bytes text."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(entry) for entry in value]
    return _plain(str(value))
