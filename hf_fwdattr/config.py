"""Settings of a response bank."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


__all__ = ["ResponseConfig"]

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class ResponseConfig(BaseModel):
    """Settings of [`ResponseCallback`] and [`build_bank`]; the defaults are the measured ones.

    Each field's description in `model_fields` says what it does.

    Example:
        >>> ResponseConfig(directions=256, source_column="source")

    Raises:
        ValueError: a value out of range, named with the allowed ones, or a name that is not a setting.
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, use_attribute_docstrings=True)

    parameters: str | list[str] = "auto"
    """The tracked weights: 'auto' (LoRA B matrices and a new head's weights if there is LoRA, else every trainable
    Linear weight, or where there is none all that is trained), 'lora_B', 'lora', 'linear', 'trainable', or regular
    expressions on canonical names."""
    segments: AtLeastOne = 3
    """Number of pieces into which the run is cut, each with one curvature, and without capture one gradient per row
    that it saw. More for a long run or one whose learning rate changes much."""
    directions: Literal["exact"] | AtLeastOne | Share = 128
    """Number of directions that span the responses; or, as a float below 1, the share of the variance of held-out
    scores to explain; or 'exact' for every tracked weight or row. More when a warning says that they explain too
    little."""
    curvature_samples: NotNegative | None = None
    """Gradients with sampled labels per segment, for the Gauss-Newton matrix; None: one per row, at most 512. More
    make scores of early steps closer, and the passes longer."""
    horizon: dict[str, float] | None = None
    """How long a row's effect is carried through training; None: along the recorded run. For a model without a
    record: {'steps': K, 'step_size': eta, 'damping': lambda} at the final weights, where 'steps' may be infinite."""
    capture: Literal["auto", "training", "after"] = "auto"
    """Where rows' gradients come from: 'training' takes them from the backward passes that train, coded on disk until
    the bank is written; 'after' reads every row again when training is done; 'auto' captures where it can."""
    averaging: Literal["none", "trajectory"] = "none"
    """'none': a score is the change of this very model. 'trajectory': it is the mean over models that stop at the end
    of each segment, smaller but closer to what other runs on these rows would show."""
    row_id_column: str | None = None
    """Column with your own integer row ids, which results then show; None: the row's position. A stream needs one."""
    source_column: str | None = None
    """Column that names each row's source, such as its publisher; sources are then scored too."""
    objective: str | Callable[..., Any] = "auto"
    """'auto', 'causal-lm', 'causal-lm-unshifted' (logits and labels at the same position), 'sequence-classification',
    or, for any other cross-entropy, a function (model, batch) -> (logits, labels)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Number type in which directions and coordinates are stored: 'auto' takes float32 where they are small, and 8
    bits a number where they are not."""
    batch_size: AtLeastOne = 16
    """Rows per forward and backward pass. Fewer when memory runs out; scores do not depend on it."""
    sample_rows: AtLeastOne = 1024
    """Number of rows from whose responses the directions are computed; all, if there are fewer. Their gradients are
    held in memory, or on disk beyond memory_budget."""
    source_directions: NotNegative = 64
    """If there are at most this many sources, each gets a direction of its own, and so an exact score."""
    gradient_predictor: bool = True
    """Keep a predictor of a query's gradient from one forward pass, with which rows are scored in two stages; costs a
    pass over at most 512 rows. Not needed if only sources are asked for."""
    row_code_bits: Literal["auto", 1, 2, 4, 8] = "auto"
    """Bits of a number in row codes, from which named rows are scored: 'auto' takes 8 for few rows, and otherwise 4, 2
    or 1, as responses_budget allows. More bits make scores closer and the bank larger."""
    responses_budget: NotNegative = 4 << 30
    """Bytes that the bank may keep of row codes. 0 keeps none: scores then come from the directions alone, and the
    bank is smaller and tells less of its rows. With private_rows none are kept."""
    memory_budget: NotNegative = 4 << 30
    """Bytes of matrices held in memory during the passes; what exceeds them goes to disk."""
    seed: int = 0
    """Seed of sampled labels and of the choice of sample rows."""
    private_rows: bool = False
    """Keep the coordinates of whole sources only: no row, row id or row hash is in the bank, and only sources can be
    scored. Needs source_column; rows without a source are left out."""
    include_text: bool | str = False
    """Keep the rows' text in the bank, so that rows are shown without the dataset: True for each row's tokens,
    decoded, or the name of the column with the text. The text is published with the bank."""
    self_check: NotNegative = 0
    """Number of sources (or twelfths of the rows) that are left out by retraining, one at a time, to compare with the
    bank's prediction; the result goes into bank.json and the card. Costs self_check + 1 trainings."""
    folder: str = "fwdattr"
    """Name of the bank's folder inside the model's; two banks of one model need two names."""
    quiet: bool = False
    """Show no progress bars."""

    if not TYPE_CHECKING:  # type checkers and editors see one keyword argument for each setting

        def __init__(self, **settings: Any):
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ValueError(_message(error, type(self))) from None

    @field_validator("horizon")
    @classmethod
    def _horizon_keys(cls, horizon: dict[str, float] | None) -> dict[str, float] | None:
        if horizon is not None and not {"steps"} <= set(horizon) <= {"steps", "step_size", "damping"}:
            raise ValueError("a dictionary with 'steps' and perhaps 'step_size' and 'damping'")
        return horizon

    @field_validator("include_text")
    @classmethod
    def _text_column(cls, include_text: bool | str) -> bool | str:
        if include_text == "":
            raise ValueError("True, False, or the name of the column with the text")
        return include_text

    @field_validator("folder")
    @classmethod
    def _plain_folder(cls, folder: str) -> str:
        if not folder or "/" in folder or "\\" in folder or folder in (".", ".."):
            raise ValueError("a plain folder name")
        return folder

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.private_rows and self.self_check:
            raise ValueError(
                f"self_check={self.self_check} leaves out rows that the bank identifies, and private_rows=True keeps "
                "none. Choose one"
            )
        if self.private_rows and self.source_column is None:
            raise ValueError("private_rows=True keeps sources only. Name them with source_column")
        if self.private_rows and self.include_text:
            raise ValueError(
                f"include_text={self.include_text!r} keeps the rows' text, and private_rows=True keeps no rows. "
                "Choose one"
            )
        return self

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; a callable objective becomes 'custom'."""
        values = self.model_dump(exclude={"objective"})
        values["objective"] = self.objective if isinstance(self.objective, str) else "custom"
        return {name: values[name] for name in type(self).model_fields}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the settings that `to_dict` described.

        Raises:
            ValueError: a value out of range, or a key that is not a setting.
        """
        return cls(**values)


def _message(error: ValidationError, config: type[BaseModel]) -> str:
    """Return the first thing that is wrong: name, value, reason and the setting's meaning."""
    errors = error.errors()
    unknown = sorted(str(detail["loc"][0]) for detail in errors if detail["type"] == "extra_forbidden")
    if unknown:
        return f"unknown setting(s) {', '.join(unknown)}. Known are {', '.join(config.model_fields)}"
    if not errors[0]["loc"]:
        return errors[0]["msg"].removeprefix("Value error, ")
    name = str(errors[0]["loc"][0])
    reasons = " or ".join(dict.fromkeys(
        detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        for detail in errors if detail["loc"][0] == name
    ))  # fmt: skip
    value = errors[0]["input"]
    return (
        f"{name}={value!r}: it should be {reasons}. {' '.join((config.model_fields[name].description or '').split())}"
    )
