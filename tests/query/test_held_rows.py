"""Coordinates as they are stored, against the bank's own reading of them."""

from pathlib import Path

import pytest
import torch

from hf_fwdattr.bank.writing import BankContents, write_bank
from hf_fwdattr.query import held_rows
from hf_fwdattr.query.held_rows import HeldRows
from tests.bank.test_bank import ROWS, K, described, parts


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "rows"])
@pytest.mark.parametrize("shard_size", [1 << 30, 3 * (4 * K + 36), 1])
def test_blocks_and_single_rows_are_those_of_the_bank(
    tmp_path: Path, kind: str, shard_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = parts()
    if kind == "rows":
        contents |= {name: contents[name][:K] for name in ("row_ids", "row_hashes", "sources")}
        contents["coordinates"] = torch.arange(1.0, K + 1)[:, None]
        fields = described(exact=True, dataset={"rows": K})
    else:
        fields = described(coordinates_dtype=kind)
    bank = write_bank(tmp_path, BankContents(fields, **contents), shard_size)
    expected = torch.cat([block for _, _, block in bank.coordinates()])
    monkeypatch.setattr(held_rows, "_BLOCK", 2 * K)
    held, chosen = HeldRows(bank), torch.tensor([2, 0] if kind == "rows" else [ROWS - 1, 0, 4])
    assert torch.equal(held.coordinates(chosen), expected[chosen])
    if kind != "rows":  # whose dense matrix nobody wants
        assert torch.equal(torch.cat(list(held.blocks())), expected)
    assert torch.equal(held.sources, torch.cat([sources for _, sources, _ in bank.coordinates()]))
