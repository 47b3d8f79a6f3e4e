"""Text of rows, sources, prompts and models, made safe for a terminal."""

import unicodedata


__all__ = ["printable"]

# Joiners shape scripts and emoji; all other characters of format (bidirectional, invisible, tags) can mislead.
_JOINERS = "\u200c\u200d"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SPACES = "\n\r\t\v\f\x85\u2028\u2029"


def printable(text: object, lines: bool = False) -> str:
    r"""Return text in which nothing moves the cursor, colours, reorders or hides: `\x1b` is shown as written here.

    Args:
        text: the text, or a value whose `str` is meant.
        lines (`bool`): keep line breaks; otherwise they are spaces, as tabs always are.
    """
    shown = str(text).replace("\r\n", "\n")
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_visible(character, lines) for character in shown)


def _visible(character: str, lines: bool) -> str:
    if character == "\n" and lines:
        return character
    if character in _SPACES:
        return " "
    if character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
