"""The steps of `scale`, each in a process of its own whose memory is its own: train, build, exact scores, ask."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig, ResponseRecorder, build_bank
from hf_fwdattr.models.likelihood import CAUSAL_LM
from hf_fwdattr.models.modes import frozen
from hf_fwdattr.query.scorer import Scorer
from hf_fwdattr.response.passes import Passes
from hf_fwdattr.response.segment import Segment
from hf_fwdattr.response.storage import Storage
from hf_fwdattr.trainer.build_context import BuildContext
from hf_fwdattr.trainer.record import CAPTURES

from .meters import PeakMemory, Phases
from .protocols.cost import Clock
from .scale_configuration import Configuration
from .scale_query import answers
from .truth import exact_scores, likelihood_gradients, recorded_passes
from .world import LanguageModelWorld


__all__ = ["STEPS"]

_PLAIN_STEPS = 50  # of training without a callback
PHASES = {
    "gradients": "hf_fwdattr.gradients.per_sample:PerSampleGradients.__call__",
    "eigenvectors": "hf_fwdattr.response.passes:Curvature",
    "curvature, the rest": "hf_fwdattr.response.passes:Passes.measure_curvature",
    "captured gradients, in the loop": "hf_fwdattr.response.captures:CaptureWriter.add",
    "captured gradients": "hf_fwdattr.response.captures:Captures.read",
    "propagation of captured gradients": "hf_fwdattr.response.segment:Segment.propagate_visits",
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
    """Make the bank, and keep it with the model: while training, or with `reuse` from the record of that training."""
    phases, measure, kept = Phases(PHASES), Passes.measure_curvature, []

    def measured(passes: Passes, samples: int) -> None:
        measure(passes, samples)
        kept.append(passes)

    with PeakMemory() as memory, mock.patch.object(Passes, "measure_curvature", measured), phases.measured():
        again = one.reuse and (one.trained / "loop.json").exists()
        bank, model, spent = (_rebuilt if again else _trained)(one)
        peaks = memory.peaks
    model.save_pretrained(str(one.bank_folder))
    sizes: dict[str, int] = {}
    for file in bank.manifest.files:
        sizes[file.kind] = sizes.get(file.kind, 0) + file.size
    result = {"loop s": json.loads((one.trained / "loop.json").read_text()), "after s": spent, "bytes": sizes}
    result |= {"phases s": phases.seconds, "spectrum": [_spectrum(segment) for segment in kept[0].segments]}
    one.write("build", result | {"of": _subject(bank)} | peaks)
    if not one.done("truth"):  # the curvature is at hand
        _keep_truth(one, model, bank, kept[0])


def _trained(one: Configuration) -> tuple[ResponseBank, Any, float]:
    """Train with the callback; return the bank, the model and the processor's seconds after the loop."""
    clock, callback, finish = Clock(), ResponseCallback(ResponseConfig(**one.settings)), ResponseRecorder.finish

    def kept_and_finished(recorder: ResponseRecorder, *given: Any) -> ResponseBank:
        recorder.record.save(one.trained / "record")
        if recorder.capture.folder is not None and recorder.capture.folder.is_dir():
            shutil.copytree(recorder.capture.folder, one.trained / "record" / CAPTURES, dirs_exist_ok=True)
        recorder.model.save_pretrained(str(one.trained))
        (one.trained / "loop.json").write_text(json.dumps(clock.loop))
        return finish(recorder, *given)

    with mock.patch.object(ResponseRecorder, "finish", kept_and_finished):
        _warm(one.world)
        trainer = one.world.trainer(str(one.bank_folder), [clock, callback])
        began = time.process_time()
        trainer.train()
        spent = time.process_time() - began - clock.loop
    assert callback.bank is not None
    return callback.bank, trainer.model, spent


def _rebuilt(one: Configuration) -> tuple[ResponseBank, Any, float]:
    """Make the bank of a training that was recorded; return what `_trained` returns."""
    model, folder = one.model(one.trained), one.bank_folder / "fwdattr"
    began = time.process_time()
    bank = build_bank(
        model, one.world.rows, ResponseConfig(**one.settings), data_collator=one.world.collate,
        record=one.trained / "record", folder=folder,
    )  # fmt: skip
    return bank, model, time.process_time() - began


def truth(one: Configuration) -> None:
    """Compute the exact scores of all rows for all queries, from the record of the run."""
    model, bank = one.reopened()
    parameters, config = bank.check_model(model), ResponseConfig(**one.settings)
    context = BuildContext(model, parameters, config, one.world.rows, one.world.collate, original=one.world.rows)
    with Storage(config.memory_budget) as storage, frozen(model):
        passes = recorded_passes(context, one.trained / "record", storage)
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
