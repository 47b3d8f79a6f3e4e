"""Schema of `bank.json`: strict, so that a bank from elsewhere is understood wholly or refused.

`SHARD_KINDS` is the one table of what a bank's shards hold: a new kind of shard is one more entry there.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .description import (
    AtLeastOne,
    Count,
    DatasetIdentity,
    ForwardPass,
    NonNegative,
    NumberType,
    Parameter,
    Privacy,
    Run,
    SegmentInfo,
    Sha256,
    Strict,
)  # fmt: skip
from .sealing import checksum, sealed


__all__ = [
    "BITS", "LARGEST_PAGE", "LONGEST_NOTE", "MOST_NOTES", "SCHEMA_VERSION", "SHARD_KINDS", "SHARD_PATTERN",
    "SMALLEST_PAGE", "STORED", "Manifest", "Pointer", "ShardFile", "ShardKind", "checksum", "code_blocks", "sealed",
]  # fmt: skip
SCHEMA_VERSION = 2
BITS = (1, 2, 4, 8)  # of a number in a row code
_BLOCK = 1024  # numbers of a row code that are rotated together and share a scale
SMALLEST_PAGE, LARGEST_PAGE = 1 << 12, 1 << 20  # bytes
LONGEST_NOTE, MOST_NOTES = 500, 16  # characters of a note, and notes


def code_blocks(size: int) -> tuple[int, int]:
    """Return how many blocks a row code of `size` numbers has, and how long they are: a power of two from 8 up.

    The longest of them that fills up a vector by at most a twentieth, or else the one that fills it up least.
    """
    lengths = [length for exponent in range(3, 11) if (length := 1 << exponent) <= _BLOCK]
    filled = {length: -(-size // length) * length for length in lengths}
    longest = [length for length in lengths if filled[length] <= 1.05 * size]
    block = max(longest) if longest else min(lengths, key=lambda length: (filled[length], -length))
    return filled[block] // block, block


Shape = tuple[int | None, ...]  # None: any extent


class _Document(Strict):
    """A whole `bank.json`; its checksum belongs to the file and not to the values."""

    def to_json(self) -> bytes:
        """Return the text of `bank.json`, with its checksum."""
        return sealed(json.loads(self.model_dump_json()))


class ShardFile(Strict):
    """A shard: its file name, kind, size in bytes and sha256, and the range of lines it holds of all of its kind."""

    name: str
    kind: str
    size: Count
    sha256: Sha256
    first: Count
    lines: Count

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in SHARD_KINDS:
            raise ValueError(f"a shard is one of {', '.join(SHARD_KINDS)}")
        return kind


class Manifest(_Document):
    """The content of `bank.json`.

    Attributes (those that do not speak for themselves):
        averaging (`str`): `none` where queries are evaluated at the model's own weights; `trajectory` where the bank
            keeps the run's mean weights for that.
        explained_variance (`float`): share of the variance of held-out scores that the directions keep.
        row_codes (`int`): number of rows whose responses are kept as codes: all or none.
        row_code_bits (`int`): bits of a number in them.
        predictor_explained_variance (`float`): share of the variance of training rows' scores that the gradient
            predictor explains, which needs one forward pass.
        predictor_missing (`str`): why a gradient predictor that was asked for is not kept.
        error_projections (`list[Parameter]`): matrices of the gradient predictor, from the error at the end of the
            model to that at a layer's output.
        regression_features (`int`): features of a query's forward pass from which a regression tells what to expect of
            its derivatives along the directions, beyond what the gradient predictor says; 0 without one.
        regression_explained_variance (`float`): share of the variance of training rows' scores that both explain.
        error_variances (`list[float]`): mean squares of a query's derivatives along the directions, or of what the
            gradient predictor and the regression leave of them, which are taken as uncorrelated between directions;
            empty where scores cannot be estimated from few of them.
        outside_variance, outside_error_variance (`float`): the same of derivatives along what is outside the
            directions, for each unit of its squared norm in the metric 1 / D: whole, and as the predictor leaves them.
        derivative_square (`float`): mean over queries of the squared derivatives along all directions together.
        gradient_square (`float`): mean squared norm of a query's gradient over the weights of row codes.
        dtype (`str`): number type of the directions; `int8` means codes of 8 bits.
        coordinates_dtype (`str`): number type of the coordinates; `int8` means whole multiples of a scale for each
            row times one for each direction.
        coordinate_scales (`list[float]`): scales of the directions with `int8`.
        page_size (`int`): bytes of a page of the shards whose lines are read singly; see `pages`.
        notes (`list[str]`): what the training showed after its first step that may make scores wrong.
    """

    schema_version: Literal[2] = 2
    libraries: dict[str, str]
    model: str | None
    revision: str | None
    weights: Sha256
    parameters: list[Parameter]
    forward_pass: ForwardPass | None = None
    objective: Literal["causal-lm", "causal-lm-unshifted", "sequence-classification", "custom"]
    optimizer: str
    segments: list[SegmentInfo]
    config: dict[str, Any]
    curvature_samples: Count
    averaging: Literal["none", "trajectory"] = "none"
    directions: AtLeastOne
    source_directions: Count
    source_scales: list[NonNegative]
    exact: bool
    explained_variance: NonNegative
    row_codes: Count = 0
    row_code_bits: Literal[1, 2, 4, 8] = 8
    predictor_explained_variance: Annotated[float, Field(le=1, allow_inf_nan=False)] | None = None
    predictor_missing: str | None = None
    error_projections: list[Parameter] = []
    regression_features: Count = 0
    regression_explained_variance: Annotated[float, Field(le=1, allow_inf_nan=False)] | None = None
    error_variances: list[NonNegative] = []
    outside_variance: NonNegative = 0.0
    outside_error_variance: NonNegative = 0.0
    derivative_square: NonNegative = 0.0
    gradient_square: NonNegative = 0.0
    dtype: NumberType
    coordinates_dtype: NumberType = "float32"
    coordinate_scales: list[NonNegative] = []
    page_size: Annotated[int, Field(ge=SMALLEST_PAGE, le=LARGEST_PAGE)] = LARGEST_PAGE
    dataset: DatasetIdentity
    sources: list[str]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    quality: dict[str, Any] = {}
    privacy: Privacy = Privacy()
    run: Run = Run()
    notes: Annotated[list[Annotated[str, Field(max_length=LONGEST_NOTE)]], Field(max_length=MOST_NOTES)] = []
    files: list[ShardFile]

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        for what, values in (
            ("parameters", [parameter.name for parameter in self.parameters]),
            ("sources", self.sources),
            ("files", [file.name for file in self.files]),
            ("error_projections", [matrix.name for matrix in self.error_projections]),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} names something twice")
        if self.source_directions not in (0, len(self.sources)) or len(self.source_scales) != self.source_directions:
            raise ValueError(
                f"source_directions={self.source_directions} and {len(self.source_scales)} source_scales do not fit "
                f"{len(self.sources)} sources"
            )
        if self.row_codes not in (0, self.dataset.rows) or (self.row_codes and self.privacy.rows == "sources"):
            raise ValueError(
                f"row_codes={self.row_codes} are neither none nor those of {self.dataset.rows} identified rows"
            )
        if self.exact and self.row_codes:
            raise ValueError(f"row_codes={self.row_codes} of rows that exact directions hold already")
        if self.error_variances and (len(self.error_variances) != self.directions or not self.row_codes):
            raise ValueError(
                f"{len(self.error_variances)} error_variances do not fit {self.directions} directions and "
                f"{self.row_codes} row codes"
            )
        if self.regression_features and not self.error_variances:
            raise ValueError(f"{self.regression_features} regression_features without error_variances")
        if len(self.coordinate_scales) != (self.directions if self.coordinates_dtype == "int8" else 0):
            raise ValueError(
                f"{len(self.coordinate_scales)} coordinate_scales do not fit {self.directions} directions and "
                f"coordinates in {self.coordinates_dtype}"
            )
        if any(len(matrix.shape) != 2 for matrix in self.error_projections):
            raise ValueError("an error projection is a matrix")
        if self.privacy.text and self.privacy.rows == "sources":
            raise ValueError("privacy keeps the rows' text and no rows: one excludes the other")
        return self

    @property
    def lines(self) -> int:
        """Lines of coordinates: one for each row, or for each source where only these are kept."""
        return len(self.sources) if self.privacy.rows == "sources" else self.dataset.rows

    @property
    def size(self) -> int:
        """P, the number of tracked parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    @property
    def directions_are_rows(self) -> bool:
        """True if the directions are the rows' own responses, scaled: each row's coordinates are one number then."""
        return self.exact and self.directions == self.dataset.rows and self.privacy.rows == "identified"

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(file.size for file in self.files)

    @property
    def row_bytes(self) -> int:
        """Size of the shards that grow with the number of rows."""
        return sum(file.size for file in self.files if SHARD_KINDS[file.kind].per_row)

    def files_of(self, kind: str) -> list[ShardFile]:
        """Return the shards of a kind, in order."""
        return [file for file in self.files if file.kind == kind]

    def pages_of(self, file: ShardFile | None = None) -> range:
        """Return the numbers of a shard's pages among all that have a hash, or of all of them."""
        counts = [-(-other.size // self.page_size) * SHARD_KINDS[other.kind].paged for other in self.files]
        at = len(counts) if file is None else self.files.index(file)
        return range(0 if file is None else sum(counts[:at]), sum(counts[: at + 1]))


class Pointer(_Document):
    """A `bank.json` beside a model whose bank lies elsewhere on the Hub, at a fixed commit."""

    schema_version: Literal[2] = 2
    bank_repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", max_length=96)]
    repo_type: Literal["model", "dataset"] = "dataset"
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    subfolder: Annotated[str, Field(pattern=r"^[\w-]*$")] = "fwdattr"


@dataclass(frozen=True)
class ShardKind:
    """A kind of shard.

    Attributes:
        tensors: (manifest, lines of the shard) -> safetensors dtype and shape of every tensor by name.
        lines: manifest -> lines in all shards of this kind together; 0 where there are none.
        count: shapes of a shard's tensors, in the order of `tensors` -> its lines.
        per_row (`bool`): whether its size grows with the number of rows.
        paged (`bool`): whether its lines are read singly, so that its pages are hashed; see `pages`.
    """

    tensors: Callable[[Manifest, int], dict[str, tuple[str, Shape]]]
    lines: Callable[[Manifest], int]
    count: Callable[[list[tuple[int, ...]]], int] = lambda shapes: shapes[0][0]
    per_row: bool = False
    paged: bool = False


STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}  # number types in safetensors


def _codes(size: int, bits: int, lines: int) -> dict[str, tuple[str, Shape]]:
    """Return the tensors of `lines` vectors of `size` numbers as codes."""
    count, block = code_blocks(size)
    return {"codes": ("U8", (lines, count * block * bits // 8)), "scales": ("F32", (lines, count))}


def _direction_tensors(manifest: Manifest, lines: int) -> dict[str, tuple[str, Shape]]:
    if manifest.dtype == "int8":
        return _codes(manifest.size, 8, lines)
    return {"directions": (STORED[manifest.dtype], (lines, manifest.size))}


def _coordinate_tensors(manifest: Manifest, lines: int) -> dict[str, tuple[str, Shape]]:
    width = 1 if manifest.directions_are_rows else manifest.directions
    tensors: dict[str, tuple[str, Shape]] = {
        "coordinates": (STORED[manifest.coordinates_dtype], (lines, width)), "row_ids": ("I64", (lines,)),
        "row_hashes": ("U8", (lines, 16)), "sources": ("I32", (lines,)),
    }  # fmt: skip
    if manifest.coordinates_dtype == "int8":
        tensors["scales"] = "F32", (lines,)
    if manifest.error_variances:
        tensors["outside"] = "F32", (lines,)
    return tensors


SHARD_KINDS = {
    # u_j: directions of rows, then one for each source.
    "directions": ShardKind(
        _direction_tensors, lambda manifest: manifest.directions + manifest.source_directions
    ),
    # c_i, with the row's id, salted hash and source (-1: none), and the norm of what is outside the directions.
    "coordinates": ShardKind(_coordinate_tensors, lambda manifest: manifest.lines, per_row=True),
    # UTF-8 of all rows, and where each begins and the last ends.
    "text": ShardKind(
        lambda manifest, lines: {"offsets": ("I64", (lines + 1,)), "text": ("U8", (None,))},
        lambda manifest: manifest.dataset.rows if manifest.privacy.text else 0,
        count=lambda shapes: shapes[0][0] - 1,
        per_row=True,
    ),
    # r_i in a few bits a number.
    "row_codes": ShardKind(
        lambda manifest, lines: _codes(manifest.size, manifest.row_code_bits, lines),
        lambda manifest: manifest.row_codes,
        per_row=True,
        paged=True,
    ),
    # sha256 of every page of the shards above whose lines are read singly, in the order of `files`.
    "page_hashes": ShardKind(
        lambda manifest, lines: {"page_hashes": ("U8", (lines, 32))},
        lambda manifest: len(manifest.pages_of()),
        per_row=True,
    ),
    # What the numbers of row codes were multiplied with.
    "code_weights": ShardKind(
        lambda manifest, lines: {"code_weights": ("F32", (manifest.size,))},
        lambda manifest: int(manifest.row_codes > 0),
        count=len,
    ),
    # All matrices of the gradient predictor in one shard: every query needs all.
    "error_projections": ShardKind(
        lambda manifest, lines: {matrix.name: ("F16", tuple(matrix.shape)) for matrix in manifest.error_projections},
        lambda manifest: len(manifest.error_projections),
        count=len,
    ),
    # What to expect of a query's derivatives from centred and scaled features, the last of which is always 1.
    "derivative_regression": ShardKind(
        lambda manifest, lines: {
            "weights": ("BF16", (lines, manifest.directions)), "means": ("F32", (lines,)), "scales": ("F32", (lines,)),
        },
        lambda manifest: manifest.regression_features + (manifest.regression_features > 0),
    ),
    # Weights at which queries are evaluated, with averaging="trajectory".
    "averaged_weights": ShardKind(
        lambda manifest, lines: {"averaged_weights": ("F32", (manifest.size,))},
        lambda manifest: int(manifest.averaging == "trajectory"),
        count=len,
    ),
}  # fmt: skip
# Names of shards, and of unfinished files (safetensors writes its files as .tmp and six letters first, and a kill
# leaves them). Nothing else in a bank's folder is ever deleted.
SHARD_PATTERN = re.compile(
    rf"(?:{'|'.join(SHARD_KINDS)})-[0-9a-f]{{8}}-[0-9]{{5}}\.safetensors|\.partial-.+|\.tmp[0-9A-Za-z]{{6}}"
)
