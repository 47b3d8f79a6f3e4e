"""What a user may choose about a response bank."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def _help(text: str, **default: Any) -> Any:
    return field(metadata={"help": text}, **default)


@dataclass
class ResponseConfig:
    """Settings of [`ResponseCallback`] and [`build_bank`]; the defaults are the measured ones.

    Raises:
        ValueError: a value out of range, named with what is allowed.
    """

    parameters: str | list[str] = _help(
        "Which weights respond: 'auto' (LoRA B matrices where there is LoRA, else every trainable Linear weight), "
        "'lora_B', 'lora', 'trainable', or regular expressions on canonical names.",
        default="auto",
    )
    segments: int = _help(
        "Stretches of the run that are propagated one after the other; each costs two passes.", default=3
    )
    directions: int | float | str = _help(
        "k, the number of directions; or a float below 1: the share of held-out score variance to keep; or 'exact'.",
        default=128,
    )
    curvature_samples: int | None = _help(
        "Sampled-label gradients per segment for the Gauss-Newton matrix; None: one per row, at most 4096.",
        default=None,
    )
    horizon: dict[str, float] | None = _help(
        "None: the run's own. Or the paper's form at the end of training: {'steps': K, 'step_size': eta, 'damping': "
        "lambda}; 'steps' may be infinite.",
        default=None,
    )
    averaging: str = _help(
        "Where the run counts as having ended: 'none': where it did, so that scores are changes of this very model; "
        "or 'trajectory', after any of its segments, so that responses and readouts are means over the run: closer to what "
        "other runs on these rows would show, the more so the longer the run and the more segments.",
        default="none",
    )
    row_id_column: str | None = _help("Column with the user's own integer row ids; None: the position.", default=None)
    source_column: str | None = _help("Column that says which source a row belongs to.", default=None)
    objective: str | Callable[..., Any] = _help(
        "'auto', 'causal-lm', 'sequence-classification', or a function (model, batch) -> (logits, labels).",
        default="auto",
    )
    dtype: str = _help(
        "What directions and coordinates are stored in: 'float32', 'bfloat16' or 'float16'.", default="float32"
    )
    batch_size: int = _help("Rows per forward and backward of the passes.", default=16)
    sample_rows: int = _help("Rows from which the directions are found (all, if there are fewer).", default=2048)
    source_directions: int = _help(
        "Sources get a direction of their own, hence exact scores, when there are at most this many.", default=64
    )
    gradient_predictor: bool = _help(
        "Keep what predicts a query's gradient from one forward pass, so that rows can be named in two stages; costs "
        "a pass over at most 512 rows.",
        default=True,
    )
    responses_budget: int = _help(
        "Bytes of rows' own responses, one for each row and responding parameter, that the bank may keep for the two "
        "stages; it keeps all rows' or none, none with private_rows or more than sample_rows rows, and 0 keeps none.",
        default=1 << 29,
    )
    memory_budget: int = _help(
        "Bytes of matrices held in memory during the passes; more goes to disk.", default=4 << 30
    )
    seed: int = _help("Of sampled labels and of the choice of sample rows.", default=0)
    private_rows: bool = _help(
        "Keep the coordinates of whole sources only: no row, row id or row hash is in the bank, and only sources can "
        "be scored. Needs source_column; rows without a source are left out.",
        default=False,
    )
    include_text: bool | str = _help(
        "Keep the rows' text in the bank, so that whoever has it sees the rows without the dataset: True for each "
        "row's tokens, decoded, or the name of the column with the text. It is published with the bank.",
        default=False,
    )
    self_check: int = _help(
        "Sources (or twelfths of the rows) that are left out for real after training, one at a time, to see whether "
        "what the bank says happens; the result goes into bank.json and the card. Costs self_check + 1 trainings.",
        default=0,
    )
    folder: str = _help("Name of the bank's folder inside the model's.", default="fwdattr")
    quiet: bool = _help("No progress bars.", default=False)

    def __post_init__(self) -> None:
        for name in ("segments", "batch_size", "sample_rows", "source_directions", "seed", "self_check"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a whole number")
        if type(self.directions) not in (int, float, str) or (
            isinstance(self.directions, str) and self.directions != "exact"
        ):
            raise ValueError(
                f"directions={self.directions!r}: a number of directions, a kept variance below 1, or 'exact'"
            )
        if isinstance(self.directions, float) and not 0 < self.directions < 1:
            raise ValueError(f"directions={self.directions}: as a float it is the variance to keep, between 0 and 1")
        for name in ("segments", "batch_size", "sample_rows") + (
            ("directions",) if isinstance(self.directions, int) else ()
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.self_check < 0:
            raise ValueError(f"self_check={self.self_check}: must not be negative")
        if self.curvature_samples is not None and self.curvature_samples < 0:
            raise ValueError(f"curvature_samples={self.curvature_samples}: must not be negative")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: 'float32', 'bfloat16' or 'float16'")
        if self.horizon is not None and not {"steps"} <= set(self.horizon) <= {"steps", "step_size", "damping"}:
            raise ValueError(f"horizon={self.horizon}: wants 'steps' and may have 'step_size' and 'damping'")
        if self.averaging not in ("none", "trajectory"):
            raise ValueError(f"averaging={self.averaging!r}: 'none' or 'trajectory'")
        if self.private_rows and self.self_check:
            raise ValueError("self_check leaves out rows that the bank knows, and private_rows=True keeps none")
        if self.private_rows and self.source_column is None:
            raise ValueError("private_rows=True keeps sources only: name them with source_column")
        if not isinstance(self.include_text, bool | str) or self.include_text == "":
            raise ValueError(
                f"include_text={self.include_text!r}: True, False, or the name of the column with the text"
            )
        if self.private_rows and self.include_text:
            raise ValueError("private_rows=True keeps no rows and include_text their text: choose one")
        if not self.folder or "/" in self.folder or "\\" in self.folder or self.folder in (".", ".."):
            raise ValueError(f"folder={self.folder!r}: must be a plain folder name")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; a callable objective becomes 'custom'."""
        values = asdict(self)
        return values | {"objective": self.objective if isinstance(self.objective, str) else "custom"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ResponseConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key that is not a setting.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown setting(s) {', '.join(unknown)}; known are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)
