"""From a record to a bank on disk: respond, factorise, write. Also for a model that was fine-tuned before."""

import inspect
import logging
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..bank.bank import ResponseBank
from ..bank.hashing import content_hash, row_hashes
from ..bank.identity import dataset_identity, libraries, model_identity, tokenizer_hash
from ..bank.writing import temporary_bank_folder, write_bank
from ..config import ResponseConfig
from ..errors import MismatchError, NumericalError, UnsupportedError
from ..gradients.per_sample import refuse_sharded_rest
from ..models.compat import refuse_silent_backward
from ..models.fsdp import is_sharded
from ..models.likelihood import resolve_objective
from ..models.modes import frozen, refuse_batch_statistics
from ..models.parameters import Parameters
from ..response.averaging import weights_read
from ..response.dataset import TrainingRows
from ..response.distributed import SINGLE_PROCESS, Ranks
from ..response.passes import Passes
from ..response.responses import Responses
from ..response.segment import Segment
from ..response.storage import Storage
from .announcement import log_plan
from .columns import Sources, column_of, row_ids_of, sources_of, texts_of
from .fit_predictor import fit_predictor
from .record import Record, Snapshot


logger = logging.getLogger(__name__)
# Below this, rows that have nothing to do with a query were seen to come out on top (a world of independent facts).
_FEW = 0.5


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
    """Response bank of a model that is already fine-tuned.

    Args:
        model (`nn.Module`): the fine-tuned model, with its adapter.
        dataset: the rows it was trained on, tokenized as they were: `input_ids` and `labels`. Columns that the model
            does not take are left out, as Trainer leaves them out.
        config (`ResponseConfig`, *optional*): settings. `horizon` says how far the responses reach: without a record
            of the run it must be given, for example {'steps': 100, 'step_size': 0.01, 'damping': 0.0}.
        data_collator (`Callable`, *optional*): the one it was trained with.
        processing_class (*optional*): the tokenizer, to be known by its hash.
        record (`str` or `Path`, *optional*): folder of a record that [`ResponseCallback`] left (in a checkpoint, or
            when its passes were interrupted); its segments are then used, as if the callback had finished.
        folder (`str` or `Path`, *optional*): where the bank is written; by default somewhere temporary that is removed
            with the returned object, so that `save_pretrained` or `push_to_hub` can place it.

    Returns:
        The bank.

    Raises:
        MismatchError: the record is of another run than this model's.
    """
    config = config or ResponseConfig()
    parameters = Parameters.of(model, config.parameters)
    collate = _taken_columns(model, config, data_collator or default_data_collator)
    if record is not None:
        kept = Record.load(Path(record))
    elif config.horizon is not None:
        kept = Record(steps=1, segments=1)
    else:
        raise UnsupportedError(
            "how far responses reach is known from the run's record (record='<checkpoint>/fwdattr-record') or from "
            "ResponseConfig(horizon={'steps': ..., 'step_size': ..., 'damping': ...}); neither was given"
        )
    keeper = None
    if folder is None:
        folder, keeper = temporary_bank_folder()
    theta = parameters.read(model).cpu()
    end = kept.end or Snapshot(len(kept.rates) or 1, theta, torch.ones_like(theta))
    if bool(torch.isfinite(theta).all()) and not torch.equal(end.theta, theta):
        raise MismatchError(
            f"the record in {record} ended with other weights than the model has (or with other responding "
            f"parameters: {len(end.theta)} then, {len(theta)} now); load the model that this run saved"
        )
    if not kept.rates:
        kept.add(1.0, *_equal_shares(model, dataset, config, collate))
    bank = respond(
        kept, end, model, parameters, dataset, collate, config, Path(folder), original=dataset,
        tokenizer=processing_class,
    )  # fmt: skip
    bank._keep = keeper
    return bank


def check(model: nn.Module, dataset: Any, collate: Any, config: ResponseConfig, original: Any) -> None:
    """Refuse before the first step, as far as one row shows it, what the passes would refuse after the last one."""
    refuse_batch_statistics(model, training=True)
    refuse_silent_backward(model)
    refuse_sharded_rest(model, Parameters.of(model, config.parameters, sharded=True))
    with torch.random.fork_rng(devices=[]):
        rows = _rows(model, dataset, collate, config)
    sources_of(original, config.source_column, len(rows))
    row_ids_of(original, config.row_id_column, len(rows))
    if isinstance(config.include_text, str):
        column_of(original, config.include_text, "include_text", len(rows))


def respond(
    record: Record,
    end: Snapshot,
    model: nn.Module,
    parameters: Parameters,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    config: ResponseConfig,
    folder: Path,
    *,
    original: Any = None,
    tokenizer: Any = None,
    ranks: Ranks = SINGLE_PROCESS,
    pace: float | None = None,
) -> ResponseBank:
    """The passes over the training set and the bank they end in; the model is left exactly as it was.

    Args:
        record (`Record`): exposures and snapshots of the run.
        end (`Snapshot`): the responding parameters now.
        dataset, collate: the rows as they were trained on.
        original (*optional*): the dataset before columns were removed, for row ids and sources.
        ranks (`Ranks`, *optional*): processes that share the passes, each with the same arguments.
        pace (`float`, *optional*): seconds that training took for a row, for the estimate of time.
    """
    if not bool(torch.isfinite(end.theta).all()):
        raise NumericalError("the trained weights are not finite (was the loss NaN?): no bank can be made of them")
    random_state, fingerprint = torch.get_rng_state(), parameters.fingerprint(model)
    objective = resolve_objective(model, config.objective)
    live = [tensor.detach().clone() for tensor in parameters.tensors(model)]
    with ranks.raise_on_all_ranks():
        rows = _rows(model, dataset, collate, config, parameters.tensors(model)[0].device)
    if record.total not in (0, len(rows)):
        raise MismatchError(
            f"the run was recorded on {record.total} rows and the dataset has {len(rows)}; pass the training set"
        )
    sources = sources_of(original if original is not None else dataset, config.source_column, len(rows))

    keep = 0 if config.private_rows or not config.gradient_predictor or is_sharded(model) else config.responses_budget

    announced = partial(log_plan, config, model, parameters, len(rows), keep, pace, ranks)
    try:
        with frozen(model), Storage(config.memory_budget) as storage:
            segments = record.build(len(rows), end, config.horizon)
            passes = Passes(
                model, parameters, objective, rows, segments, weights_read(config.averaging, segments, end.theta), storage,
                config.seed, config.quiet, record.smoothing, ranks, announced, config.averaging,
            )  # fmt: skip
            exact_sources = len(sources.names) if len(sources.names) <= config.source_directions else 0
            responses = passes.run(
                config.directions, config.curvature_samples, config.sample_rows, sources.of, exact_sources, keep
            )
            if config.averaging == "none":
                _restore(model, parameters, live)
            else:  # queries are read there, and so is what predicts their gradients
                parameters.write(model, passes.theta)
            with ranks.raise_on_all_ranks():
                if ranks.rank == 0:
                    _warn(responses)
                    _write(
                        folder, responses, passes.segments, model, parameters, rows, sources, config, original,
                        tokenizer, record, fingerprint, passes.theta,
                    )  # fmt: skip
            return ResponseBank(folder, verify=False)
    finally:
        _restore(model, parameters, live)
        torch.set_rng_state(random_state)


@torch.no_grad()
def _restore(model: nn.Module, parameters: Parameters, live: list[Tensor]) -> None:
    for tensor, value in zip(parameters.tensors(model), live, strict=True):
        tensor.copy_(value)


def _warn(responses: Responses) -> None:
    if responses.kept < _FEW:
        logger.warning(
            "%d directions keep %.0f %% of the variance of held-out scores: these rows have little in common, and "
            "the best rows of a query may be missed. Ask for more directions, or directions='exact'",
            len(responses.directions), 100 * max(0.0, responses.kept),
        )  # fmt: skip


def _write(
    folder: Path,
    responses: Responses,
    segments: list[Segment],
    model: nn.Module,
    parameters: Parameters,
    rows: TrainingRows,
    sources: Sources,
    config: ResponseConfig,
    original: Any,
    tokenizer: Any,
    record: Record,
    fingerprint: str,
    theta: Tensor,
) -> ResponseBank:
    salt = secrets.token_bytes(16)
    name, revision = model_identity(model)
    shown = original if original is not None else rows.dataset
    described = {
        "libraries": libraries(),
        "model": name,
        "revision": revision,
        "weights": fingerprint,
        "parameters": [
            {"name": n, "shape": list(s)} for n, s in zip(parameters.names, parameters.shapes, strict=True)
        ],
        "objective": resolve_objective(model, config.objective).name,
        "optimizer": record.optimizer,
        "run": {"steps": record.steps, "first": record.first, "label_smoothing": record.smoothing},
        "segments": [_stretch(segment) for segment in segments],
        "config": config.to_dict(),
        "curvature_samples": responses.curvature_samples,
        "averaging": config.averaging,
        "directions": len(responses.directions),
        "source_directions": len(responses.sources),
        "source_scales": responses.source_scales.tolist(),
        "exact": responses.exact,
        "explained_variance": max(0.0, responses.kept),
        "dtype": config.dtype,
        "dataset": dataset_identity(shown) | {"rows": len(rows), "tokenizer": tokenizer_hash(tokenizer)},
        "sources": sources.names,
        "salt": salt.hex(),
        "privacy": {"rows": "sources" if config.private_rows else "identified", "text": bool(config.include_text)},
    }
    texts = texts_of(shown, config.include_text, tokenizer)
    if config.private_rows:
        lines = _per_source(responses.coordinates, sources)
    else:
        row_ids = row_ids_of(shown, config.row_id_column, len(rows))
        lines = (responses.coordinates, row_ids, _hashes(rows, salt, config.quiet), sources.of)
    projections, covariance, likelihood = {}, None, resolve_objective(model, config.objective)
    if config.gradient_predictor and not config.private_rows:
        look = fit_predictor(
            model, parameters, likelihood, rows, responses.products, config.memory_budget,
            responses.scores, config.quiet,
        )  # fmt: skip
        if look is not None:
            projections, described["predictor_explained_variance"], covariance = look.maps, look.share, look.kernel
    return write_bank(
        folder, described, [responses.directions, responses.sources], *lines, texts=texts,
        responses=responses.own if projections else None, error_projections=projections, error_covariance=covariance,
        weights=theta if config.averaging == "trajectory" else None,
    )  # fmt: skip


def _per_source(coordinates: Tensor, sources: Sources) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates, ids, hashes and sources of lines that are whole sources: what `private_rows` keeps of rows."""
    known, count = sources.of >= 0, len(sources.names)
    total = torch.zeros(count, coordinates.shape[1], dtype=torch.float64)
    total.index_add_(0, sources.of[known], coordinates[known].double())
    lines = torch.arange(count)
    return total.to(coordinates.dtype), lines, torch.zeros(count, 16, dtype=torch.uint8), lines


def _hashes(rows: TrainingRows, salt: bytes, quiet: bool) -> Tensor:
    """(rows, 16) bytes: each row's tokens without padding, or all its tensors where the dataset has no tokens."""
    found = row_hashes(rows.dataset, salt)
    if found is None:
        found = (content_hash(rows.batch([index]), salt) for index in range(len(rows)))
    result = torch.zeros(len(rows), 16, dtype=torch.uint8)
    for index, line in enumerate(tqdm(found, "row hashes", len(rows), unit="row", disable=quiet, leave=False)):
        result[index] = torch.frombuffer(bytearray(line), dtype=torch.uint8)
    return result


def _rows(
    model: nn.Module, dataset: Any, collate: Any, config: ResponseConfig, device: torch.device | str = "cpu"
) -> TrainingRows:
    classes = {"causal-lm": "vocab_size", "sequence-classification": "num_labels"}
    field = classes.get(resolve_objective(model, config.objective).name, "")
    count = getattr(getattr(model, "config", None), field, None)
    return TrainingRows(dataset, collate, config.batch_size, device, _context(model), count)


def _taken_columns(model: nn.Module, config: ResponseConfig, collate: Callable[[list[Any]], Any]) -> Any:
    """The collator, shown only columns that the model's forward takes; all of them with an objective of one's own."""
    if callable(config.objective):
        return collate
    unwrap = getattr(model, "get_base_model", None)  # PeftModel has it
    inner = unwrap() if callable(unwrap) else model
    known = {*inspect.signature(inner.forward).parameters, "label", "label_ids", "labels"}

    def collate_taken(features: list[Any]) -> Any:
        return collate([{k: v for k, v in f.items() if k in known} if isinstance(f, dict) else f for f in features])

    return collate_taken


def _equal_shares(model: nn.Module, dataset: Any, config: ResponseConfig, collate: Any) -> tuple[Tensor, Tensor]:
    """Every row seen once in one step: rows (n,), and one over the supervised tokens of all of them (n,)."""
    rows = _rows(model, dataset, collate, config)
    shifted = resolve_objective(model, config.objective).name == "causal-lm"
    tokens = 0
    for _, batch in rows.batches():
        labels = batch["labels"]
        tokens += int((labels[:, 1:] if shifted else labels).ne(-100).sum())
    return torch.arange(len(rows)), torch.full((len(rows),), 1.0 / max(tokens, 1), dtype=torch.float64)


def _stretch(segment: Segment) -> dict[str, float]:
    assert segment.curvature is not None
    return {
        "length": segment.horizon.length,
        "weight_decay": segment.weight_decay,
        "shrinkage": segment.curvature.shrinkage,
    }


def _context(model: nn.Module) -> int | None:
    """The longest row that the model can read, as far as its configuration says."""
    config = getattr(model, "config", None)
    value = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return value if isinstance(value, int) and value > 0 else None
