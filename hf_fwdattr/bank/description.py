"""Descriptions of model, dataset and run in `bank.json`; each refuses what it does not know."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


__all__ = [
    "AtLeastOne", "Count", "DatasetIdentity", "ForwardPass", "NonNegative", "NumberType", "Parameter", "Privacy",
    "Run", "SegmentInfo", "Sha256", "Strict",
]  # fmt: skip
Count = Annotated[int, Field(ge=0, le=1 << 48)]
AtLeastOne = Annotated[int, Field(ge=1, le=1 << 48)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NumberType = Literal["float32", "bfloat16", "float16", "int8"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Parameter(Strict):
    """A tensor by its canonical name, and its shape."""

    name: str
    shape: list[Count]


class SegmentInfo(Strict):
    """A segment: its length in optimizer time (the sum of its learning rates), weight decay, curvature shrinkage."""

    length: float
    weight_decay: NonNegative = 0.0
    shrinkage: NonNegative = 0.0


class DatasetIdentity(Strict):
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


class ForwardPass(Strict):
    """State that the forward pass uses beyond the tracked weights; see `models.forward_state.ForwardState`."""

    sha256: Sha256
    dtypes: str
    sketches: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    scalings: dict[str, Annotated[float, Field(allow_inf_nan=False)]]


class Privacy(Strict):
    """The part of the rows that is in the bank.

    Attributes:
        rows (`str`): `identified` for row ids and salted hashes, `sources` for the sums of whole sources alone.
        text (`bool`): whether the rows' text is kept, which it is only on request.
    """

    rows: Literal["identified", "sources"] = "identified"
    text: bool = False


class Run(Strict):
    """The fine-tuning run: its planned optimizer steps, and the number taken before recording began.

    Responses to steps that were not recorded are unknown: with `first` above 0, the bank covers the steps after it.
    """

    steps: Count = 0
    first: Count = 0
    label_smoothing: NonNegative = 0.0
