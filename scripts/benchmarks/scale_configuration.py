"""One line of the table of `scale`: a world, its number of rows, a bank, and the files of what was measured."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict

from hf_fwdattr import ResponseBank

from .meters import code_version
from .registry import load_world
from .world import LanguageModelWorld


__all__ = ["Configuration"]

_BUILT_BY = ("models", "layers", "gradients", "bank", "response", "trainer")  # rooms that a bank depends on
_ASKED_BY = (*_BUILT_BY, "jvp", "query")


@dataclass(frozen=True)
class Configuration:
    """One line of the table: a world with so many rows, and a bank of so many bits.

    Attributes:
        bits: of a number in a row code, or `default`.
        queries: number of queries; `timed` of them are timed.
        budgets: forward passes of a query.
        work: folder in which banks are kept.
        curvature: samples of a segment's curvature; 0 for the library's own number.
        reuse: where a bank is to be made, train only if no record of that training is kept.
    """

    world_name: str
    rows: int
    bits: str
    queries: int
    budgets: tuple[int, ...]
    timed: int
    work: Path
    curvature: int = 0
    reuse: bool = False

    @cached_property
    def world(self) -> LanguageModelWorld:
        """The world, with its rows and queries."""
        world = load_world(self.world_name, rows=self.rows, queries=self.queries)
        assert isinstance(world, LanguageModelWorld)
        return world

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the bank."""
        settings = self.world.bank | {"quiet": True}
        if self.curvature:
            settings["curvature_samples"] = self.curvature
        return settings if self.bits == "default" else settings | {"row_code_bits": int(self.bits)}

    @property
    def run_folder(self) -> Path:
        """Folder of everything about this world with so many rows."""
        return self.work / f"{self.world_name}-{self.world.version}-{self.rows}"

    @property
    def trained(self) -> Path:
        """Folder of the trained model and the record of its training."""
        return self.run_folder / "trained"

    @property
    def _name(self) -> str:
        return f"bank-{self.bits}-{self.curvature}"

    @cached_property
    def bank_folder(self) -> Path:
        """Folder of the model and its bank, by the code that builds it."""
        version = code_version(_BUILT_BY, self.world.version, sorted(self.settings.items()))
        return self.run_folder / f"{self._name}-{version}"

    @cached_property
    def files(self) -> dict[str, Path]:
        """File that each step writes; the step is done when its file is there."""
        asked = code_version(_ASKED_BY, self.queries, self.budgets, self.timed)
        return {
            "plain": self.run_folder / "plain.json",
            "build": self.bank_folder / "build.json",
            "truth": self.run_folder / f"truth-{self.queries}-{self.curvature}.pt",
            "ask": self.bank_folder / f"asked-{asked}.json",
        }

    def write(self, step: str, result: dict[str, Any]) -> None:
        """Write the result of a step, which is then done."""
        self.files[step].parent.mkdir(parents=True, exist_ok=True)
        self.files[step].write_text(json.dumps(result))

    def read(self, step: str) -> dict[str, Any]:
        """Return the result of a step."""
        return json.loads(self.files[step].read_text())

    def done(self, step: str) -> bool:
        """Return whether the result of a step is there; exact scores are of one trained model and its curvature."""
        if step != "truth" or not self.files[step].exists():
            return self.files[step].exists()
        return torch.load(self.files[step])["of"] == self.read("build")["of"]

    def model(self, folder: Path) -> Any:
        """Return the model with the adapter that was saved in a folder."""
        model = self.world.model()
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return model.eval()

    def reopened(self) -> tuple[Any, ResponseBank]:
        """Return the trained model and its bank."""
        return self.model(self.bank_folder), ResponseBank.from_pretrained(self.bank_folder)
