"""The contents of a bank: the manifest's fields and the tables, from the responses and what they were built from."""

import secrets
from typing import Any

import torch
from torch import Tensor

from ..bank.hashing import content_hash, longest_row, row_hashes
from ..bank.identity import dataset_identity, libraries, model_identity, tokenizer_hash
from ..bank.model_state import describe_forward_pass
from ..bank.tokenizer_identity import tokenizer_parts
from ..bank.writing import BankContents
from ..response.passes import Passes
from ..response.progress import progress_bar
from ..response.responses import Responses
from ..response.segment import Segment
from .build_context import BuildContext
from .columns import row_ids_of, texts_of
from .fit_predictor import PredictorFit
from .record import Record


__all__ = ["bank_contents"]


def bank_contents(
    context: BuildContext,
    record: Record,
    passes: Passes,
    responses: Responses,
    fingerprint: str,
    predictor: PredictorFit | None,
) -> BankContents:
    """Return the contents of the bank, but for the row codes; on rank 0.

    Args:
        context (`BuildContext`): what the bank is built from.
        record (`Record`): the run.
        passes, responses: the passes and their result.
        fingerprint (`str`): of the trained weights.
        predictor (`PredictorFit`, *optional*): the gradient predictor, after the passes.
    """
    config, salt = context.config, secrets.token_bytes(16)
    description = _description(context, record, passes.segments, responses)
    description |= _estimation(responses)
    description |= {"weights": fingerprint, "salt": salt.hex()}
    if config.private_rows:
        sources = context.sources
        tables = _source_tables(responses.dense_coordinates(), sources.source_of_row, len(sources.names))
    else:
        row_ids = row_ids_of(context.original, config.row_id_column, len(context.rows))
        tables = (responses.coordinates, row_ids, _row_hashes(context, salt), context.sources.source_of_row)
    contents = BankContents(description, [responses.directions, responses.sources], *tables)
    contents.texts = texts_of(context.original, config.include_text, context.tokenizer)
    if config.averaging == "trajectory":
        contents.averaged_weights = passes.theta
    if predictor is not None and predictor.missing:
        description["predictor_missing"] = predictor.missing
    elif predictor is not None:
        description["predictor_explained_variance"] = responses.predictor_explained_variance
        contents.error_projections = predictor.error_projections
    if responses.regressed is not None:
        contents.derivative_regression = responses.regressed.regression.tensors()
        description["regression_explained_variance"] = responses.regressed.explained_variance
    if responses.estimation is not None:
        contents.outside = responses.estimation.outside
    return contents


def _description(
    context: BuildContext, record: Record, segments: list[Segment], responses: Responses
) -> dict[str, Any]:
    """Return the manifest's fields that describe the model, the run, the dataset and the responses."""
    config, parameters, sources = context.config, context.parameters, context.sources
    name, revision = model_identity(context.model)
    dataset: dict[str, Any] = {"rows": len(context.rows), "tokenizer": tokenizer_hash(context.tokenizer)}
    dataset |= {"tokenizer_parts": tokenizer_parts(context.tokenizer), "longest": longest_row(context.rows.dataset)}
    return {
        "libraries": libraries(),
        "model": name,
        "revision": revision,
        "parameters": [
            {"name": n, "shape": list(s)} for n, s in zip(parameters.names, parameters.shapes, strict=True)
        ],
        "forward_pass": describe_forward_pass(context.model, parameters),
        "objective": context.objective.name,
        "optimizer": record.optimizer,
        "run": {"steps": record.steps, "first": record.first, "label_smoothing": record.smoothing},
        "notes": record.bank_notes(),
        "segments": [_segment_fields(segment) for segment in segments],
        "config": config.to_dict(),
        "curvature_samples": responses.curvature_samples,
        "averaging": config.averaging,
        "directions": len(responses.directions),
        "source_directions": len(responses.sources),
        "source_scales": responses.source_scales.tolist(),
        "exact": responses.exact,
        "explained_variance": max(0.0, responses.explained_variance),
        "row_code_bits": context.code_bits or 8,
        "dtype": _number_type(config.dtype, responses, responses.directions.numel() + responses.sources.numel(), 32),
        "coordinates_dtype": _number_type(config.dtype, responses, responses.coordinates.numel(), 1),
        "dataset": dataset_identity(context.original) | dataset,
        "sources": sources.names,
        "privacy": {"rows": "sources" if config.private_rows else "identified", "text": bool(config.include_text)},
    }


def _estimation(responses: Responses) -> dict[str, Any]:
    """Return the manifest's fields that scores are estimated with."""
    estimation = responses.estimation
    if estimation is None:
        return {}
    return {
        "error_variances": estimation.error_variances.tolist(),
        "outside_variance": estimation.outside_variance,
        "outside_error_variance": estimation.outside_error_variance,
        "derivative_square": estimation.derivative_square,
        "gradient_square": estimation.gradient_square,
    }


def _number_type(wanted: str, responses: Responses, numbers: int, few: int) -> str:
    """Return the number type of a matrix: as wanted, or float32 up to `few` MiB and 8 bits beyond; exact is exact."""
    if wanted != "auto":
        return wanted
    return "float32" if responses.exact or 4 * numbers <= few << 20 else "int8"


def _segment_fields(segment: Segment) -> dict[str, float]:
    assert segment.curvature is not None
    return {
        "length": segment.horizon.length,
        "weight_decay": segment.weight_decay,
        "shrinkage": segment.curvature.shrinkage,
    }


def _source_tables(coordinates: Tensor, source_of_row: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return coordinates, ids, hashes and sources of whole sources in place of rows, for `private_rows`."""
    has_source = source_of_row >= 0
    total = torch.zeros(count, coordinates.shape[1], dtype=torch.float64)
    total.index_add_(0, source_of_row[has_source], coordinates[has_source].double())
    indices = torch.arange(count)
    return total.to(coordinates.dtype), indices, torch.zeros(count, 16, dtype=torch.uint8), indices


def _row_hashes(context: BuildContext, salt: bytes) -> Tensor:
    """Return hashes (rows, 16) of each row's tokens without padding, or of all its tensors if it has no tokens."""
    rows, quiet = context.rows, context.config.quiet
    hashes = row_hashes(rows.dataset, salt)
    if hashes is None:
        hashes = (content_hash(rows.batch([index]), salt) for index in range(len(rows)))
    result = torch.zeros(len(rows), 16, dtype=torch.uint8)
    bar = progress_bar(hashes, desc="row hashes", total=len(rows), unit="row", disable=quiet)
    for index, value in enumerate(bar):
        result[index] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    return result
