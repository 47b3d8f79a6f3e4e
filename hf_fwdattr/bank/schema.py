"""Schema of `bank.json`: strict, so that a bank from elsewhere is understood wholly or refused.

`SHARD_KINDS` is the one table of what a bank's shards hold: a new kind of shard is one more entry there.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


__all__ = [
    "GROUP", "LARGEST_PAGE", "LONGEST_NOTE", "MOST_NOTES", "SCHEMA_VERSION", "SHARD_KINDS", "SHARD_PATTERN",
    "SMALLEST_PAGE", "DatasetIdentity", "ForwardPass", "Manifest", "Parameter", "Pointer", "Privacy", "Run",
    "SegmentInfo", "ShardFile", "ShardKind", "checksum", "sealed",
]  # fmt: skip
SCHEMA_VERSION = 2
GROUP = 128  # numbers of a row code that share a scale
SMALLEST_PAGE, LARGEST_PAGE = 1 << 12, 1 << 20  # bytes
LONGEST_NOTE, MOST_NOTES = 500, 16  # characters of a note, and notes
Count = Annotated[int, Field(ge=0, le=1 << 48)]
AtLeastOne = Annotated[int, Field(ge=1, le=1 << 48)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def checksum(values: dict[str, Any]) -> str:
    """Return the sha256 of a `bank.json`'s content: its values without `checksum`, keys sorted, no white space."""
    content = {name: value for name, value in values.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(values: dict[str, Any]) -> bytes:
    """Return the text of a `bank.json` with these values and their checksum."""
    content = values | {"checksum": checksum(values)}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Document(_Strict):
    """A whole `bank.json`; its checksum belongs to the file and not to the values."""

    def to_json(self) -> bytes:
        """Return the text of `bank.json`, with its checksum."""
        return sealed(json.loads(self.model_dump_json()))


class Parameter(_Strict):
    """A tensor by its canonical name, and its shape."""

    name: str
    shape: list[Count]


class SegmentInfo(_Strict):
    """A segment: its length in optimizer time (the sum of its learning rates), weight decay, curvature shrinkage."""

    length: float
    weight_decay: NonNegative = 0.0
    shrinkage: NonNegative = 0.0


class DatasetIdentity(_Strict):
    """The training set as far as it names itself; its rows are identified by their hashes.

    Attributes (those that do not speak for themselves):
        tokenizer (`str`): sha256 of the tokenizer's vocabulary.
        tokenizer_parts (`dict`): a hash of every other part of it that decides about token ids.
        longest (`int`): tokens of the longest row, to which longer texts were cut; 0 where it is not known.
    """

    rows: AtLeastOne
    repo: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: list[str] = []
    fingerprint: str | None = None
    tokenizer: str | None = None
    tokenizer_parts: dict[str, str] = {}
    longest: Count = 0


class ForwardPass(_Strict):
    """State that the forward pass uses beyond the tracked weights; see `models.forward_state.ForwardState`."""

    sha256: Sha256
    dtypes: str
    sketches: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    scalings: dict[str, Annotated[float, Field(allow_inf_nan=False)]]


class ShardFile(_Strict):
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


class Privacy(_Strict):
    """The part of the rows that is in the bank.

    Attributes:
        rows (`str`): `identified` for row ids and salted hashes, `sources` for the sums of whole sources alone.
        text (`bool`): whether the rows' text is kept, which it is only on request.
    """

    rows: Literal["identified", "sources"] = "identified"
    text: bool = False


class Run(_Strict):
    """The fine-tuning run: its planned optimizer steps, and the number taken before recording began.

    Responses to steps that were not recorded are unknown: with `first` above 0, the bank covers the steps after it.
    """

    steps: Count = 0
    first: Count = 0
    label_smoothing: NonNegative = 0.0


class Manifest(_Document):
    """The content of `bank.json`.

    Attributes (those that do not speak for themselves):
        averaging (`str`): `none` where queries are evaluated at the model's own weights; `trajectory` where the bank
            keeps the run's mean weights for that.
        explained_variance (`float`): share of the variance of held-out scores that the directions keep.
        row_codes (`int`): number of rows whose responses are kept as codes: all or none.
        predictor_explained_variance (`float`): share of the variance of training rows' scores that the gradient
            predictor explains, which needs one forward pass.
        predictor_missing (`str`): why a gradient predictor that was asked for is not kept.
        error_projections (`list[Parameter]`): matrices of the gradient predictor, from the error at the end of the
            model to that at a layer's output.
        error_covariance (`bool`): whether the covariance of the gradient predictor's errors is kept.
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
    predictor_explained_variance: Annotated[float, Field(le=1, allow_inf_nan=False)] | None = None
    predictor_missing: str | None = None
    error_projections: list[Parameter] = []
    error_covariance: bool = False
    page_size: Annotated[int, Field(ge=SMALLEST_PAGE, le=LARGEST_PAGE)] = LARGEST_PAGE
    dtype: Literal["float32", "bfloat16", "float16"]
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
        if self.error_covariance and not (self.row_codes and self.error_projections):
            raise ValueError("error_covariance is of no use without row_codes and error_projections")
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
    def stored(self) -> str:
        """The safetensors name of the dtype of directions and coordinates."""
        return {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[self.dtype]

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


Shape = tuple[int | None, ...]  # None: any extent


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


SHARD_KINDS = {
    # u_j: directions of rows, then one for each source.
    "directions": ShardKind(
        lambda manifest, lines: {"directions": (manifest.stored, (lines, manifest.size))},
        lambda manifest: manifest.directions + manifest.source_directions,
    ),
    # c_i, with the row's id, salted hash and source (-1: none).
    "coordinates": ShardKind(
        lambda manifest, lines: {
            "coordinates": (manifest.stored, (lines, manifest.directions)), "row_ids": ("I64", (lines,)),
            "row_hashes": ("U8", (lines, 16)), "sources": ("I32", (lines,)),
        },
        lambda manifest: manifest.lines,
        per_row=True,
    ),
    # UTF-8 of all rows, and where each begins and the last ends.
    "text": ShardKind(
        lambda manifest, lines: {"offsets": ("I64", (lines + 1,)), "text": ("U8", (None,))},
        lambda manifest: manifest.dataset.rows if manifest.privacy.text else 0,
        count=lambda shapes: shapes[0][0] - 1,
        per_row=True,
    ),
    # r_i in 8 bits a number.
    "row_codes": ShardKind(
        lambda manifest, lines: {
            "codes": ("I8", (lines, manifest.size)), "scales": ("F32", (lines, -(-manifest.size // GROUP))),
        },
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
    # All matrices of the gradient predictor in one shard: every query needs all.
    "error_projections": ShardKind(
        lambda manifest, lines: {matrix.name: ("F16", tuple(matrix.shape)) for matrix in manifest.error_projections},
        lambda manifest: len(manifest.error_projections),
        count=len,
    ),
    "error_covariance": ShardKind(
        lambda manifest, lines: {"error_covariance": ("F16", (manifest.row_codes, manifest.row_codes))},
        lambda manifest: manifest.row_codes if manifest.error_covariance else 0,
        per_row=True,
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
