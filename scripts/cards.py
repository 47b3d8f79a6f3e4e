"""Renders the cards in model_cards/: of banks from the `bank.json` beside each, of worlds from scripts/results.

--check only compares, and fails if one is stale.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import world_cards

from hf_fwdattr.bank.card import with_section
from hf_fwdattr.bank.schema import MANIFEST, read_manifest


CARDS = Path(__file__).parents[1] / "model_cards"


def rendered(folder: Path) -> str:
    """The card of the bank whose manifest lies in a folder: what stands before the section stays as it is."""
    card = folder / "README.md"
    return with_section(card.read_text(encoding="utf-8"), read_manifest(folder), f"me/{folder.name}")


def everything() -> Iterator[tuple[Path, str]]:
    """Every card and what it should say."""
    for path in sorted(CARDS.glob(f"*/{MANIFEST}")):
        yield path.with_name("README.md"), rendered(path.parent)
    for world in world_cards.WORLDS:
        yield CARDS / world.name / "README.md", world_cards.rendered(world)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for card, text in everything():
        if card.exists() and card.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{card} is stale: run scripts/cards", file=sys.stderr)
            stale += 1
        else:
            card.parent.mkdir(exist_ok=True)
            card.write_text(text, encoding="utf-8")
            print(f"wrote {card}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
