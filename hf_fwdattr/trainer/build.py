"""The build of a bank from the record of a run: respond, assemble, write. Also for a model fine-tuned before."""

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..bank.bank import ResponseBank
from ..bank.writing import BankWriter, temporary_bank_folder
from ..config import ResponseConfig
from ..errors import MismatchError, NumericalError, UnsupportedError
from ..gradients.per_sample import refuse_unhooked_shards
from ..models.compat import refuse_silent_backward
from ..models.interrupts import uninterrupted
from ..models.likelihood import IGNORED
from ..models.modes import frozen, refuse_batch_statistics
from ..models.names import base_model
from ..models.parameters import TrackedParameters
from ..response.assembly import Assembly
from ..response.averaging import query_theta
from ..response.captures import Captures
from ..response.distributed import Ranks
from ..response.exact_sources import ExactSources
from ..response.gradient_stream import GradientStream
from ..response.passes import Passes, PassSettings
from ..response.plan import Plan
from ..response.responses import Responses
from ..response.storage import Storage
from .bank_contents import bank_contents
from .build_context import BuildContext
from .capture import open_captures
from .columns import column_of, row_ids_of, sources_of
from .fit_predictor import PREDICTOR_MISSING, PredictorFit, missing_predictor, predictor_bytes
from .record import Record, Snapshot, captures_of
from .row_features import ContextFeatures
from .trial_batch import refuse_failing_batch


__all__ = ["build_bank", "refuse_unsupported", "respond"]

logger = logging.getLogger(__name__)
# Below this, rows unrelated to a query were seen to come out on top (a world of independent facts).
_LITTLE_VARIANCE = 0.5


def build_bank(
    model: nn.Module,
    dataset: Any,
    config: ResponseConfig | None = None,
    *,
    data_collator: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    record: str | Path | None = None,
    folder: str | Path | None = None,
) -> ResponseBank:
    """Build the response bank of a model that is already fine-tuned.

    Args:
        model (`nn.Module`): the fine-tuned model, with its adapter.
        dataset: the rows it was trained on, tokenized as they were: `input_ids` and `labels`. Columns that the model
            does not take are left out, as Trainer leaves them out.
        config (`ResponseConfig`, *optional*): settings. Without a record of the run, `horizon` must say how far the
            responses reach, for example {'steps': 100, 'step_size': 0.01, 'damping': 0.0}.
        data_collator (`Callable`, *optional*): the one it was trained with.
        processing_class (*optional*): the tokenizer, identified in the bank by its hash.
        record (`str` or `Path`, *optional*): folder of a record that [`ResponseCallback`] left (in a checkpoint, or
            when its passes were interrupted); its segments are then used, as if the callback had finished.
        folder (`str` or `Path`, *optional*): where the bank is written; by default a temporary folder that is removed
            with the returned object, so that `save_pretrained` or `push_to_hub` can place it.

    Returns:
        The bank.

    Raises:
        MismatchError: the record is of another run than this model's.
    """
    config = config or ResponseConfig()
    parameters = TrackedParameters.of(model, config.parameters)
    collate = _drop_unused_columns(model, config, data_collator or default_data_collator)
    context = BuildContext(model, parameters, config, dataset, collate, original=dataset, tokenizer=processing_class)
    if record is not None:
        run = Record.load(Path(record))
    elif config.horizon is not None:
        run = Record(steps=1, segments=1)
    else:
        raise UnsupportedError(
            "build_bank: neither a record nor a horizon was given, so it is unknown how far responses reach. Pass the "
            "run's record (record='<checkpoint>/fwdattr-record') or "
            "ResponseConfig(horizon={'steps': ..., 'step_size': ..., 'damping': ...})"
        )
    keeper = None
    if folder is None:
        folder, keeper = temporary_bank_folder()
    theta = parameters.read(model).cpu()
    end = run.end or Snapshot(len(run.rates) or 1, theta, torch.ones_like(theta))
    if bool(torch.isfinite(theta).all()) and not torch.equal(end.theta, theta):
        raise MismatchError(
            f"the record in {record} ended with other weights than the model has (or tracks other parameters: "
            f"{len(end.theta)} then, {len(theta)} now). Load the model that this run saved"
        )
    if not run.rates:
        run.add(1.0, *_equal_weights(context))
    bank = respond(context, run, end, Path(folder), None if record is None else captures_of(Path(record)))
    bank._keep = keeper
    return bank


def refuse_unsupported(context: BuildContext) -> str:
    """Refuse before the first training step, as far as few rows show it, what the passes would refuse at the end.

    Returns:
        Why rows' gradients cannot be captured in the training; empty if nothing stands in the way.

    Raises:
        AttributionError: of the kind that the passes would raise.
    """
    model, config = context.model, context.config
    refuse_batch_statistics(model, training=True)
    refuse_silent_backward(model)
    refuse_unhooked_shards(model, context.parameters)
    with torch.random.fork_rng(devices=[]):
        total = len(context.rows)
    sources_of(context.original, config.source_column, total)
    row_ids_of(context.original, config.row_id_column, total)
    if isinstance(config.include_text, str):
        column_of(context.original, config.include_text, "include_text", total)
    return refuse_failing_batch(context)


def respond(
    context: BuildContext, record: Record, end: Snapshot, folder: Path, captured: Path | None = None
) -> ResponseBank:
    """Run the passes over the training set and write the bank; the model is left exactly as it was.

    Args:
        context (`BuildContext`): what the bank is built from.
        record (`Record`): row weights and snapshots of the run.
        end (`Snapshot`): the tracked parameters now.
        folder (`Path`): the bank's folder.
        captured (`Path`, *optional*): folder of the gradients that training took.

    Raises:
        MismatchError: the run was recorded on another number of rows.
        NumericalError: the trained weights or a gradient are not finite.
    """
    if not bool(torch.isfinite(end.theta).all()):
        raise NumericalError("the trained weights are not finite, so they have no responses. Was the loss NaN?")
    model, parameters, ranks = context.model, context.parameters, context.ranks
    random_state, fingerprint = torch.get_rng_state(), parameters.fingerprint(model)
    weights = [tensor.detach().clone() for tensor in parameters.tensors(model)]
    with ranks.raise_on_all_ranks():
        total = len(context.rows)
    if record.total not in (0, total):
        raise MismatchError(
            f"the run was recorded on {record.total} rows and the dataset has {total}. Pass the run's training set"
        )
    sources = context.sources
    exact_sources = ExactSources(len(sources.names), sources.source_of_row)
    if len(sources.names) > context.config.source_directions:
        exact_sources = ExactSources.none(total)
    try:
        with frozen(model), Storage(context.config.memory_budget) as storage:
            passes = _passes(context, record, end, storage, _shared_captures(captured, record, ranks))
            predictor = PredictorFit(context, storage) if context.keeps_predictor else None
            assembly = Assembly(passes, exact_sources, predictor is not None)
            _log_plan(context, assembly.plan)
            with BankWriter(folder) as writer:
                # A custom likelihood is unknown where the bank is read.
                expects = context.keeps_predictor and context.objective.name != "custom"
                features = ContextFeatures(context) if expects else None
                responses = assembly.run(predictor, writer.add_codes if context.code_bits else None, features)
                _restore(model, parameters, weights)
                with ranks.raise_on_all_ranks():
                    if ranks.rank == 0:
                        _warn_of_little_variance(responses)
                        writer.finish(bank_contents(context, record, passes, responses, fingerprint, predictor))
            bank = ResponseBank(folder, verify=False)
    finally:
        with uninterrupted():
            _restore(model, parameters, weights)
            torch.set_rng_state(random_state)
    if ranks.rank == 0:
        logger.info(
            "response bank: %s (%.1f MB, %d rows). With the model saved beside it, ask: "
            "pipeline('training-data-attribution', model='%s')(prompt)",
            bank.folder, bank.manifest.bytes / 1e6, len(bank), bank.folder.parent,
        )  # fmt: skip
    return bank


def _shared_captures(folder: Path | None, record: Record, ranks: Ranks) -> Captures | None:
    """Return the captured gradients of a run; None where one of the ranks cannot read them."""
    found = open_captures(folder, record)
    return found if all(ranks.objects(found is not None)) else None


def _passes(
    context: BuildContext, record: Record, end: Snapshot, storage: Storage, captures: Captures | None
) -> Passes:
    config = context.config
    captures = None if config.horizon is not None else captures
    segments = record.build(len(context.rows), end, config.horizon, captures)
    stream = GradientStream(
        context.model, context.parameters, context.objective, context.rows, context.ranks, config.quiet
    )
    settings = PassSettings(
        directions=config.directions,
        curvature_samples=config.curvature_samples,
        sample_rows=config.sample_rows,
        code_bits=context.code_bits,
        averaging=config.averaging,
        smoothing=record.smoothing,
        seed=config.seed,
    )
    theta = query_theta(config.averaging, segments, end.theta)
    return Passes(stream, segments, theta, storage, settings, captures)


def _log_plan(context: BuildContext, plan: Plan) -> None:
    """Write the plan to stderr, with the fit of the gradient predictor that follows on rank 0."""
    config = context.config
    if config.quiet or context.ranks.rank > 0:
        return
    missing = missing_predictor(context) if context.keeps_predictor else ""
    if missing:
        plan = replace(plan, predictor_rows=0)
    elif context.keeps_predictor:
        plan = replace(plan, predictor_bytes=predictor_bytes(context))
    summary = plan.summary(config.memory_budget, context.seconds_per_row)
    if context.code_bits:
        summary += f"; row codes of {context.code_bits} bits"
    elif config.directions != "exact" and not config.private_rows:
        summary += "; no row codes, as responses_budget has no room for them, so scores come from the directions alone"
    if missing:
        summary += f"; no gradient predictor: {missing}. {PREDICTOR_MISSING}"
    tqdm.write(f"response bank: {summary}", file=sys.stderr)


def _warn_of_little_variance(responses: Responses) -> None:
    if responses.explained_variance < _LITTLE_VARIANCE:
        logger.warning(
            "%d directions explain %.0f %% of the variance of held-out scores: these rows have little in common, and "
            "the best rows of a query may be missed. Ask for more directions, or directions='exact'",
            len(responses.directions), 100 * max(0.0, responses.explained_variance),
        )  # fmt: skip


@torch.no_grad()
def _restore(model: nn.Module, parameters: TrackedParameters, weights: list[Tensor]) -> None:
    for tensor, value in zip(parameters.tensors(model), weights, strict=True):
        tensor.copy_(value)


def _drop_unused_columns(model: nn.Module, config: ResponseConfig, collate: Callable[[list[Any]], Any]) -> Any:
    """Return the collator with only the columns that the model's forward takes; with a custom objective, with all."""
    if callable(config.objective):
        return collate
    used = {*inspect.signature(base_model(model).forward).parameters, "label", "label_ids", "labels"}

    def collate_used(features: list[Any]) -> Any:
        return collate([{k: v for k, v in f.items() if k in used} if isinstance(f, dict) else f for f in features])

    return collate_used


def _equal_weights(context: BuildContext) -> tuple[Tensor, Tensor]:
    """Return the rows (n,) and weights (n,) of one step on all rows: one over the number of supervised tokens."""
    shifted = context.objective.shifts_labels
    tokens = 0
    for _, batch in context.rows.batches():
        labels = batch["labels"]
        tokens += int((labels[:, 1:] if shifted else labels).ne(IGNORED).sum())
    total = len(context.rows)
    return torch.arange(total), torch.full((total,), 1.0 / max(tokens, 1), dtype=torch.float64)
