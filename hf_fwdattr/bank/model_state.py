"""State of a model's forward pass as a bank records it, and the check of a live model against it."""

from dataclasses import asdict
from typing import Any

from torch import nn

from ..errors import MismatchError
from ..models.forward_state import SETTING, ForwardState, forward_state
from ..models.parameters import TrackedParameters
from .description import ForwardPass
from .schema import Manifest


__all__ = ["check_forward_pass", "describe_forward_pass"]

_ROUNDING = 0.01  # of a weight's root mean square: bfloat16 moves a sum with random signs by 0.0011, one deviation
_CURE = (
    "Load the base model and the adapters that the bank was made with, make the pipeline anew, or accept scores of "
    "another model with allow_mismatch=['weights']"
)


def describe_forward_pass(model: nn.Module, parameters: TrackedParameters) -> dict[str, Any] | None:
    """Return the manifest's `forward_pass`; None for a model that is sharded over processes."""
    state = forward_state(model, parameters.live)
    if state is None:
        return None
    return {name: value for name, value in asdict(state).items() if name != "norms"}


def check_forward_pass(manifest: Manifest, model: nn.Module, parameters: TrackedParameters) -> None:
    """Compare weights that a bank does not track, scalings of adapters and settings of modules with the manifest's.

    Raises:
        MismatchError: another weight, one more or one less, another scaling or setting; it is named.
    """
    expected = manifest.forward_pass
    state = None if expected is None else forward_state(model, parameters.live)
    if expected is None or state is None:
        return
    _check_scalings(expected, state)
    _check_settings(expected, state)
    if state.sha256 == expected.sha256:
        return
    for name in [*expected.sketches, *state.sketches]:
        if SETTING not in name and (name in expected.sketches) != (name in state.sketches):
            where = (
                "of the bank is not in the model" if name in expected.sketches else "of the model is not the bank's"
            )
            raise MismatchError(f"{name}: this weight {where}, though the forward pass uses it. {_CURE}")
    sketches = [(name, sketch) for name, sketch in expected.sketches.items() if SETTING not in name]
    moved = [name for name, sketch in sketches if abs(sketch - state.sketches[name]) > _limit(state, name)]
    if moved or state.dtypes == expected.dtypes:
        name = moved[0] if moved else "untracked weights"
        raise MismatchError(
            f"{name}: not the values that the bank was made with, though the bank does not track them (sha256 "
            f"{state.sha256[:16]}... of all such weights, bank {expected.sha256[:16]}...). Every score depends on "
            f"them. {_CURE}"
        )


def _limit(state: ForwardState, name: str) -> float:
    return _ROUNDING * state.norms[name] + 1e-6


def _check_scalings(expected: ForwardPass, state: ForwardState) -> None:
    for path in sorted({*expected.scalings, *state.scalings}):
        here, there = state.scalings.get(path, 0.0), expected.scalings.get(path, 0.0)
        if abs(here - there) > 1e-6 * max(abs(here), abs(there)):
            raise MismatchError(
                f"{path}: its adapters are scaled by {here:g} and were scaled by {there:g} for the bank (0: none is "
                f"active). Other scalings give other outputs and scores. {_CURE}"
            )


def _check_settings(expected: ForwardPass, state: ForwardState) -> None:
    """Compare the settings that both know: libraries name them differently from version to version."""
    for name, value in state.sketches.items():
        known = expected.sketches.get(name, value)
        rounding = 0.01 if name.endswith("inv_freq") else 1e-6  # frequencies are rounded with the model's dtype
        if SETTING in name and abs(value - known) > rounding * max(abs(value), abs(known)):
            what = "another one" if name.startswith("config") else f"{value:g} here and {known:g} for the bank"
            raise MismatchError(
                f"{name}: {what}, though the forward pass computes with it. Another setting gives other outputs and "
                f"scores. {_CURE}"
            )
