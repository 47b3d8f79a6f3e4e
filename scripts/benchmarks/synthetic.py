"""Banks of random numbers, of any size."""

from pathlib import Path
from typing import Any

import torch

from hf_fwdattr import ResponseBank
from hf_fwdattr.bank.writing import BankContents, write_bank


__all__ = ["synthetic_bank"]


def synthetic_bank(
    folder: Path, rows: int, k: int, parameters: int, sources: int = 0, dtype: str = "float32", text: int = 0
) -> ResponseBank:
    """Write a bank with so many rows, directions, tracked parameters and sources' directions, and open it.

    Args:
        text (`int`): bytes of text of each row; none if 0.
    """
    generator = torch.Generator().manual_seed(0)
    names = [f"source {number}" for number in range(max(sources, 2))]
    description: dict[str, Any] = {
        "libraries": {}, "model": None, "revision": None, "weights": "0" * 64,
        "parameters": [{"name": "lora_B.weight", "shape": [parameters]}], "objective": "causal-lm",
        "optimizer": "adamw", "segments": [], "config": {}, "curvature_samples": 0, "directions": k,
        "source_directions": sources, "source_scales": [1.0] * sources, "exact": False, "explained_variance": 1.0,
        "dtype": dtype, "dataset": {"rows": rows, "tokenizer": None}, "sources": names, "salt": "0" * 32,
        "privacy": {"text": text > 0},
    }  # fmt: skip
    counts = (k, sources) if sources else (k,)
    contents = BankContents(
        description, [torch.randn(n, parameters, generator=generator) for n in counts],
        torch.randn(rows, k, generator=generator), torch.arange(rows),
        torch.randint(0, 256, (rows, 16), generator=generator).to(torch.uint8), torch.arange(rows) % len(names),
        texts=(f"{row:{text}}" for row in range(rows)) if text else None,
    )  # fmt: skip
    return write_bank(folder, contents)
