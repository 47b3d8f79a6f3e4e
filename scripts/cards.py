"""Renders the cards in model_cards/ from the `bank.json` beside each; --check only compares, and fails if stale."""

import argparse
import sys
from pathlib import Path

from hf_fwdattr.bank.card import with_section
from hf_fwdattr.bank.manifest import MANIFEST, read_manifest


CARDS = Path(__file__).parents[1] / "model_cards"


def rendered(folder: Path) -> str:
    """The card of the bank whose manifest lies in a folder: what stands before the section stays as it is."""
    card = folder / "README.md"
    return with_section(card.read_text(encoding="utf-8"), read_manifest(folder), f"me/{folder.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for path in sorted(CARDS.glob(f"*/{MANIFEST}")):
        card, text = path.with_name("README.md"), rendered(path.parent)
        if card.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{card} is stale: run scripts/cards", file=sys.stderr)
            stale += 1
        else:
            card.write_text(text, encoding="utf-8")
            print(f"wrote {card}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
