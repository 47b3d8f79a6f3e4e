"""Identity of a tokenizer: hashes of everything in it that decides which tokens a text becomes."""

import hashlib
import json
from typing import Any


__all__ = ["tokenizer_hash", "tokenizer_parts"]

# Covers what a Python tokenizer does in its own code: spaces, case, accents, digits, numbers, line ends, emoji.
_TEXTS = ("A text.", "  two spaces\n\tand Ünïcode é e\u0301 ﬁ", "12345 + 678 = x_1; HELLO hello 你好 🙂", "w1 w2 w3")


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Return the sha256 of a tokenizer's vocabulary, hexadecimal; None without a tokenizer."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def tokenizer_parts(tokenizer: Any) -> dict[str, str]:
    """Return a hash, 16 hexadecimal digits, of every part of a tokenizer but its vocabulary; {} without a tokenizer.

    Padding, truncation and the pad token are left out: pipelines and trainers set them, and no text is read otherwise.
    """
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return {}
    ends = {name: str(getattr(tokenizer, name, None)) for name in ("bos_token", "eos_token", "unk_token")}
    parts: dict[str, Any] = {
        "special tokens": ends,
        "chat template": getattr(tokenizer, "chat_template", None),
        "encoding of texts": [_encoded(tokenizer, text) for text in _TEXTS],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        whole = json.loads(backend.to_str())
        for name in ("normalizer", "pre_tokenizer", "post_processor"):
            parts[name] = whole.get(name)
        parts["merges"] = (whole.get("model") or {}).get("merges")
    return {name: _digest(value) for name, value in parts.items()}


def _encoded(tokenizer: Any, text: str) -> Any:
    try:
        return list(tokenizer(text)["input_ids"])
    except (ValueError, TypeError, KeyError):  # a vocabulary without these letters
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
