"""The contents of a bank: the manifest's fields and the tables, from the responses and what they were built from."""

import secrets
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bank.hashing import content_hash, longest_row, row_hashes
from ..bank.identity import dataset_identity, libraries, model_identity, tokenizer_hash
from ..bank.model_state import describe_forward_pass
from ..bank.tokenizer_identity import tokenizer_parts
from ..bank.writing import BankContents
from ..response.passes import Passes
from ..response.responses import Responses
from ..response.segment import Segment
from .build_context import BuildContext
from .columns import row_ids_of, texts_of
from .fit_predictor import fit_predictor
from .record import Record


__all__ = ["bank_contents"]


def bank_contents(
    context: BuildContext, record: Record, passes: Passes, responses: Responses, fingerprint: str
) -> BankContents:
    """Fit the gradient predictor and return the contents of the bank; on rank 0.

    Args:
        context (`BuildContext`): what the bank is built from; its model at the weights that queries are read at.
        record (`Record`): the run.
        passes, responses: the passes and their result.
        fingerprint (`str`): of the trained weights.
    """
    config, salt = context.config, secrets.token_bytes(16)
    description = _description(context, record, passes.segments, responses)
    description |= {"weights": fingerprint, "salt": salt.hex()}
    if config.private_rows:
        tables = _source_tables(responses.coordinates, context.sources.source_of_row, len(context.sources.names))
    else:
        row_ids = row_ids_of(context.original, config.row_id_column, len(context.rows))
        tables = (responses.coordinates, row_ids, _row_hashes(context, salt), context.sources.source_of_row)
    contents = BankContents(description, [responses.directions, responses.sources], *tables)
    contents.texts = texts_of(context.original, config.include_text, context.tokenizer)
    if config.averaging == "trajectory":
        contents.averaged_weights = passes.theta
    predictor = fit_predictor(context, responses) if context.keeps_predictor else None
    if isinstance(predictor, str):
        description["predictor_missing"] = predictor
    elif predictor is not None:
        description["predictor_explained_variance"] = predictor.explained_variance
        contents.row_codes = responses.row_codes
        contents.error_projections = predictor.error_projections
        contents.error_covariance = predictor.error_covariance
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
        "dtype": config.dtype,
        "dataset": dataset_identity(context.original) | dataset,
        "sources": sources.names,
        "privacy": {"rows": "sources" if config.private_rows else "identified", "text": bool(config.include_text)},
    }


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
    for index, value in enumerate(tqdm(hashes, "row hashes", len(rows), unit="row", disable=quiet, leave=False)):
        result[index] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    return result
