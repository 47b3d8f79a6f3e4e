"""Results of attribution: as tensors, and as the plain values that the pipeline returns."""

from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from .ranking import RankedRows


__all__ = ["Attribution", "AttributionResult", "Ranking", "RowScore", "SourceScore"]


@dataclass
class Attribution:
    """Rows and sources behind one query."""

    proponents: RankedRows  # rows with positive scores, best first; empty where no rows are wanted
    opponents: RankedRows  # rows with negative scores, worst first
    sources: Tensor  # (sources,) nats, float64
    passes: int  # forward passes spent


@dataclass
class Ranking:
    """Named rows of one query, and scores of all rows."""

    proponents: RankedRows  # rows with positive scores, best first
    opponents: RankedRows  # rows with negative scores, worst first
    scores: Tensor  # (rows,) nats, float64; exact for the rows that were read, estimated for the others
    passes: int  # forward passes spent
    stds: Tensor | None = None  # (rows,) standard deviations of `scores`, float64; None where they are not known


class RowScore(TypedDict):
    """One training row in a result."""

    row: int  # its position in the training set, or its value of `row_id_column`
    score: float  # nats of the output's log-likelihood that are owed to the row
    std: float | None  # standard deviation of the score: what codes leave out, or the estimate's; None if unknown
    exact: bool  # whether the score was read along the row's own response, and not estimated
    token_scores: list[float]  # the score by output token
    source: str | None
    example: Any  # the row itself, where the dataset is given or the bank holds its text; else None


class SourceScore(TypedDict):
    """One source in a result: the summed score of its rows, in nats."""

    source: str
    score: float


class ClassificationResult(TypedDict):
    """The pipeline's result for one input of a classifier."""

    label: str  # the output, given or predicted
    examples: list[RowScore]  # as for generated text; `token_scores` has one number
    sources: list[SourceScore]


class AttributionResult(TypedDict):
    """The pipeline's result for one input."""

    generated_text: str  # the output, generated or given
    tokens: list[str]  # the output by token; they join to `generated_text`, special tokens aside
    token_ids: list[int]  # the same as ids
    offsets: list[tuple[int, int]]  # where each token stands in `generated_text`; empty for special tokens
    examples: list[RowScore]  # named rows, highest score first: proponents, then opponents
    sources: list[SourceScore]  # all sources, highest score first
