"""The steps of `scale`, each in a process of its own whose memory is its own: train, build, exact scores, ask."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.query.loading import AutoModelForAttribution
from hf_fwdattr.query.scorer import Scorer
from hf_fwdattr.response.passes import Passes
from hf_fwdattr.response.segment import Segment
from hf_fwdattr.response.storage import Storage
from hf_fwdattr.trainer.build_context import BuildContext

from .meters import PeakMemory, Phases, code_version
from .protocols.cost import Clock
from .registry import load_world
from .scale_query import answers
from .truth import exact_scores, likelihood_gradients, recorded_passes
from .world import LanguageModelWorld


__all__ = ["BITS", "STEPS", "Configuration"]

BITS = "row_code_bits"  # the setting that `--bits` is about
_BUILT_BY = ("models", "layers", "gradients", "bank", "response", "trainer")  # rooms that a bank depends on
_ASKED_BY = (*_BUILT_BY, "jvp", "query")
_PLAIN_STEPS = 50  # of training without a callback
PHASES = {
    "gradients": "hf_fwdattr.gradients.per_sample:PerSampleGradients.__call__",
    "eigenvectors": "hf_fwdattr.response.passes:Curvature",
    "curvature, the rest": "hf_fwdattr.response.passes:Passes.measure_curvature",
    "propagation": "hf_fwdattr.response.segment:Segment.propagate",
    "adjoint": "hf_fwdattr.response.segment:Segment.adjoint",
    "responses, the rest": "hf_fwdattr.response.passes:Passes.respond",
    "directions": "hf_fwdattr.response.assembly:factorize",
    "coordinates": "hf_fwdattr.response.passes:Passes.project",
    "rows, the rest": "hf_fwdattr.response.assembly:_RowStream.respond",
    "row codes": "hf_fwdattr.bank.codes:RowCodes.of",
    "gradient predictor": "hf_fwdattr.trainer.fit_predictor:PredictorFit.__call__",
    "writing": "hf_fwdattr.bank.writing:BankWriter.finish",
}


@dataclass(frozen=True)
class Configuration:
    """One line of the table: a world with so many rows, and a bank of so many bits.

    Attributes:
        bits: of a number in a row code, or `default`.
        queries: number of queries; `timed` of them are timed.
        budgets: forward passes of a query.
        work: folder in which banks are kept.
        curvature: samples of a segment's curvature; 0 for the library's own number.
        reuse: take a bank of the same settings whatever code it was built by.
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
        if self.bits == "default":
            return settings
        if BITS not in ResponseConfig.model_fields:
            raise SystemExit(f"--bits {self.bits}: this version of the library has no choice of bits. Leave it out")
        return settings | {BITS: int(self.bits)}

    @property
    def run_folder(self) -> Path:
        """Folder of everything about this world with so many rows."""
        return self.work / f"{self.world_name}-{self.rows}"

    @property
    def _name(self) -> str:
        return f"bank-{self.bits}-{self.curvature}"

    @cached_property
    def bank_folder(self) -> Path:
        """Folder of the model and its bank, by the code that builds it."""
        version = code_version(_BUILT_BY, self.world.version, sorted(self.settings.items()))
        built = self.run_folder.glob(f"{self._name}-*/build.json") if self.reuse else ()
        kept = max(built, key=lambda path: path.stat().st_mtime, default=None)
        return kept.parent if kept else self.run_folder / f"{self._name}-{version}"

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

    def reopened(self) -> tuple[Any, ResponseBank]:
        """Return the trained model and its bank."""
        model = AutoModelForAttribution.from_pretrained(str(self.bank_folder)).eval()
        return model, ResponseBank.from_pretrained(self.bank_folder)


def plain(one: Configuration) -> None:
    """Train some steps without a callback, for the time of a row."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        _warm(one.world)
        trainer = one.world.trainer(folder, [clock], max_steps=_PLAIN_STEPS)
        trainer.train()
    rows = _PLAIN_STEPS * trainer.args.per_device_train_batch_size
    one.write("plain", {"row s": clock.loop / rows} | memory.peaks)


def build(one: Configuration) -> None:
    """Train with the callback, and keep model, bank and record."""
    clock, phases = Clock(), Phases(PHASES)
    callback, kept = ResponseCallback(ResponseConfig(**one.settings)), []
    measure = Passes.measure_curvature

    def measured(passes: Passes, samples: int) -> None:
        measure(passes, samples)
        kept.append(passes)

    with PeakMemory() as memory, mock.patch.object(Passes, "measure_curvature", measured), phases.measured():
        _warm(one.world)
        trainer = one.world.trainer(str(one.bank_folder), [clock, callback])
        began, wall = time.process_time(), time.perf_counter()
        trainer.train()
        spent, wall = time.process_time() - began, time.perf_counter() - wall
        peaks = memory.peaks
    bank = callback.bank
    assert bank is not None
    trainer.save_model(str(one.bank_folder))
    callback.recorder.record.save(one.bank_folder / "record")
    sizes: dict[str, int] = {}
    for file in bank.manifest.files:
        sizes[file.kind] = sizes.get(file.kind, 0) + file.size
    result = {"loop s": clock.loop, "after s": spent - clock.loop, "wall s": wall, "phases s": phases.seconds}
    result["spectrum"] = [_spectrum(segment) for segment in kept[0].segments]
    one.write("build", result | {"bytes": sizes, "of": _subject(bank)} | peaks)
    if not one.done("truth"):  # the curvature is at hand
        _keep_truth(one, trainer.model, bank, kept[0])


def truth(one: Configuration) -> None:
    """Compute the exact scores of all rows for all queries, from the record of the run."""
    model, bank = one.reopened()
    parameters, config = bank.check_model(model), ResponseConfig(**one.settings)
    context = BuildContext(model, parameters, config, one.world.rows, one.world.collate, original=one.world.rows)
    with Storage(config.memory_budget) as storage, frozen(model):
        passes = recorded_passes(context, one.bank_folder / "record", storage)
        passes.measure_curvature(bank.manifest.curvature_samples)
        _keep_truth(one, model, bank, passes)


def _keep_truth(one: Configuration, model: Any, bank: ResponseBank, passes: Passes) -> None:
    """Write the exact scores, given passes whose curvature is measured."""
    parameters = passes.stream.parameters
    parameters.write(model, passes.theta)
    gradients = likelihood_gradients(model, parameters, CAUSAL_LM, one.world.batches(one.world.queries, 1))
    torch.save({"scores": exact_scores(passes, gradients), "of": _subject(bank)}, one.files["truth"])


def ask(one: Configuration) -> None:
    """Ask every query within every budget, and time some of them against plain forwards."""
    model, bank = one.reopened()
    queries = one.world.token_lists()
    with PeakMemory() as memory:
        result = answers(Scorer(bank, model), queries, one.budgets, one.timed)
        peaks = memory.peaks
    one.write("ask", result | peaks)


def _subject(bank: ResponseBank) -> list[Any]:
    """Return what exact scores depend on: the trained weights, and how many samples tell the curvature."""
    return [bank.manifest.weights, bank.manifest.curvature_samples]


def _spectrum(segment: Segment) -> dict[str, int]:
    """Return how many eigenvalues of the curvature, times the segment's length, are above some sizes."""
    assert segment.curvature is not None
    values = segment.horizon.length * segment.curvature.values
    return {f"{least:g}": int((values > least).sum()) for least in (0.0, 1e-3, 1e-2, 0.1, 1.0)}


def _warm(world: LanguageModelWorld) -> None:
    """Train for two steps, so that what the first steps load is not timed."""
    with tempfile.TemporaryDirectory() as folder:
        world.trainer(folder, max_steps=2).train()


STEPS: dict[str, Callable[[Configuration], None]] = {"plain": plain, "build": build, "truth": truth, "ask": ask}
