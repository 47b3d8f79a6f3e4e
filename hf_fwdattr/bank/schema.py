"""What `bank.json` says: a strict schema, so that a bank from elsewhere is understood wholly or refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import BankError
from .codes import group_count
from .files import check_header, digest, inside, no_link, unique_json


SCHEMA = 2
MANIFEST = "bank.json"
LARGEST = 1 << 26  # bytes
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Some = Annotated[int, Field(ge=1, le=1 << 48)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Parameter(_Strict):
    """A responding parameter: canonical name and shape."""

    name: str
    shape: list[Count]


class SegmentInfo(_Strict):
    """A segment: its length in optimizer time, the sum of its rates, and how far its curvature was shrunk."""

    length: float
    weight_decay: Positive = 0.0
    shrinkage: Positive = 0.0


class DatasetIdentity(_Strict):
    """What is known of the training set; rows themselves are known by their hashes."""

    rows: Some
    repo: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: list[str] = []
    fingerprint: str | None = None
    tokenizer: str | None = None


class File(_Strict):
    """One shard: its name, its size in bytes, its hash, and which lines of the whole it holds."""

    name: str
    kind: Literal[
        "directions", "coordinates", "text", "row_codes", "error_projections", "error_covariance", "averaged_weights"
    ]
    size: Count
    sha256: Sha256
    first: Count
    lines: Count


class Privacy(_Strict):
    """What of the rows leaves with the bank: their ids and salted hashes, or nothing but their sources' sums; and
    whether their text does, which it never does unasked."""

    rows: Literal["identified", "sources"] = "identified"
    text: bool = False


class Run(_Strict):
    """The fine-tune: its planned optimizer steps, and how many of them were taken before anything was recorded.

    Responses to steps that were not recorded are unknown: with `first` above 0, the bank is of the steps after it.
    """

    steps: Count = 0
    first: Count = 0
    label_smoothing: Positive = 0.0


class Manifest(_Strict):
    """The whole of `bank.json`.

    Attributes (those that do not speak for themselves):
        averaging (`str`): `none` where queries are read at the model's own weights; `trajectory` where the bank keeps others.
        responses (`int`): rows whose own responses are kept, all or none.
        kernel (`bool`): whether it is kept how errors of first looks go together; see `kriging`.
        maps (`list[Parameter]`): matrices from the error at the end of the model to that at a layer's output.
        gradient_predictor (`float`): share of the variance of training rows' scores that one forward explains.
    """

    schema_version: Literal[2] = 2
    libraries: dict[str, str]
    model: str | None
    revision: str | None
    weights: Sha256
    parameters: list[Parameter]
    objective: str
    optimizer: str
    segments: list[SegmentInfo]
    config: dict[str, Any]
    curvature_samples: Count
    averaging: Literal["none", "trajectory"] = "none"
    directions: Some
    source_directions: Count
    source_scales: list[Positive]
    exact: bool
    explained_variance: Positive
    row_codes: Count = 0
    predictor_explained_variance: Annotated[float, Field(le=1, allow_inf_nan=False)] | None = None
    error_projections: list[Parameter] = []
    error_covariance: bool = False
    dtype: Literal["float32", "bfloat16", "float16"]
    dataset: DatasetIdentity
    sources: list[str]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    quality: dict[str, Any] = {}
    privacy: Privacy = Privacy()
    run: Run = Run()
    files: list[File]

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        for what, values in (
            ("parameters", [parameter.name for parameter in self.parameters]),
            ("sources", self.sources),
            ("files", [file.name for file in self.files]),
            ("error_projections", [table.name for table in self.error_projections]),
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
                f"row_codes={self.row_codes} are neither none nor those of {self.dataset.rows} known rows"
            )
        if self.error_covariance and not (self.row_codes and self.error_projections):
            raise ValueError("a kernel of errors without rows' responses and maps is of no use")
        if any(len(table.shape) != 2 for table in self.error_projections):
            raise ValueError("a map of errors is a matrix")
        if self.privacy.text and self.privacy.rows == "sources":
            raise ValueError("privacy keeps the rows' text and no rows: one excludes the other")
        return self

    @property
    def lines(self) -> int:
        """Lines of coordinates: one for each row, or for each source where only these were kept."""
        return len(self.sources) if self.privacy.rows == "sources" else self.dataset.rows

    @property
    def size(self) -> int:
        """P."""
        total = 0
        for parameter in self.parameters:
            count = 1
            for extent in parameter.shape:
                count *= extent
            total += count
        return total

    def to_json(self) -> bytes:
        """As it is written."""
        return (self.model_dump_json(indent=2) + "\n").encode()


class Pointer(_Strict):
    """A `bank.json` beside a model whose bank lies elsewhere on the Hub, at a fixed commit."""

    schema_version: Literal[2] = 2
    bank_repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", max_length=96)]
    repo_type: Literal["model", "dataset"] = "dataset"
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    subfolder: Annotated[str, Field(pattern=r"^[\w-]*$")] = "fwdattr"

    def to_json(self) -> bytes:
        """As it is written."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bank in `folder`.

    Raises:
        BankError: there is none, it is no JSON, or a field is missing, unknown or of the wrong kind.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BankError(f"no bank in {folder}: there is no {MANIFEST}")
    values = _values(path)
    if "bank_repo" in values:
        raise BankError(f"{path} only points to a bank in {values['bank_repo']!r}, which cannot point on again")
    return _parsed(path, values, Manifest)


def read_pointer(path: Path) -> Pointer | None:
    """Where a `bank.json` points to; None if it is a bank's own.

    Raises:
        BankError: it is no JSON, or a pointer with a field that is missing, unknown or of the wrong kind.
    """
    values = _values(path)
    return _parsed(path, values, Pointer) if "bank_repo" in values else None


def _values(path: Path) -> dict[str, Any]:
    no_link(path)
    if path.stat().st_size > LARGEST:
        raise BankError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {LARGEST}")
    try:
        values = unique_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is not sound JSON: {error}") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(values, dict) or type(version) is not int or version != SCHEMA:
        raise BankError(f"{path}: schema_version is {version!r} and this package reads {SCHEMA}; update hf-fwdattr")
    return values


def _parsed(path: Path, values: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BankError(f"{path}: {field}: {first['msg']} (found {str(first.get('input'))[:80]!r})") from error


KINDS = ("directions", "coordinates", "text", "row_codes", "error_projections", "error_covariance", "averaged_weights")
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check_layout(manifest: Manifest) -> None:
    """The shards that a manifest names follow each other without a gap and hold all lines.

    Raises:
        BankError: naming the file, and both values.
    """
    expected: dict[str, int] = dict.fromkeys(KINDS, 0)
    for file in manifest.files:
        inside(Path(), file.name)
        if file.first != expected[file.kind]:
            raise BankError(f"{file.name} begins at line {file.first} and should begin at {expected[file.kind]}")
        expected[file.kind] += file.lines
    width, texts = (
        manifest.directions + manifest.source_directions,
        manifest.dataset.rows if manifest.privacy.text else 0,
    )
    said = {
        "directions": width, "coordinates": manifest.lines, "text": texts, "row_codes": manifest.row_codes,
        "error_projections": len(manifest.error_projections), "averaged_weights": int(manifest.averaging == "trajectory"),
        "error_covariance": manifest.row_codes if manifest.error_covariance else 0,
    }  # fmt: skip
    for kind, lines in expected.items():
        if lines != said[kind]:
            raise BankError(f"the shards hold {lines} lines of {kind} and bank.json says {said[kind]}")


def check_shard(path: Path, file: File, manifest: Manifest, verify: bool = True) -> None:
    """One file is what the manifest says; nothing is allocated for it before that.

    Args:
        verify (`bool`, defaults to `True`): its hash too.

    Raises:
        BankError: naming the file, and both values.
    """
    no_link(path)
    if not path.is_file():
        raise BankError(f"{path} is missing; download the bank again")
    size = path.stat().st_size
    if size != file.size:
        raise BankError(f"{path} has {size} bytes and bank.json says {file.size}; download the bank again")
    if verify and digest(path) != file.sha256:
        raise BankError(f"{path} was changed: its sha256 is not {file.sha256[:16]}... as bank.json says")
    check_table(check_header(path), file, manifest)


def check_table(found: dict[str, tuple[str, tuple[int, ...]]], file: File, manifest: Manifest) -> None:
    """dtype and shape of every tensor in a shard against the manifest's.

    Raises:
        BankError: naming the file, and both values.
    """
    lines, stored = file.lines, _STORED[manifest.dtype]
    letters = found.get("text", ("", ()))[1]  # as many as there are; the file's length was compared
    tables: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "directions": {"directions": (stored, (lines, manifest.size))},
        "coordinates": {
            "coordinates": (stored, (lines, manifest.directions)), "row_ids": ("I64", (lines,)),
            "row_hashes": ("U8", (lines, 16)), "sources": ("I32", (lines,)),
        },
        "row_codes": {
            "codes": ("I8", (lines, manifest.size)), "scales": ("F32", (lines, group_count(manifest.size))),
        },
        "error_projections": {table.name: ("F16", tuple(table.shape)) for table in manifest.error_projections},
        "error_covariance": {"error_covariance": ("F16", (manifest.row_codes, manifest.row_codes))},
        "averaged_weights": {"averaged_weights": ("F32", (manifest.size,))},
        "text": {"text": ("U8", letters if len(letters) == 1 else (0,)), "offsets": ("I64", (lines + 1,))},
    }  # fmt: skip
    wanted = tables[file.kind]
    if found != wanted:
        raise BankError(f"{file.name} holds {found} and bank.json says {wanted}")
