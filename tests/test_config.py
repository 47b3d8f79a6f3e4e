from dataclasses import fields
from typing import Any

import pytest

from hf_fwdattr import ResponseConfig


def test_a_config_survives_json() -> None:
    config = ResponseConfig(parameters=["q_proj"], directions=0.9, horizon={"steps": 3, "step_size": 0.1})
    assert ResponseConfig.from_dict(config.to_dict()) == config


def test_a_function_as_objective_is_called_custom() -> None:
    assert ResponseConfig(objective=lambda *_: None).to_dict()["objective"] == "custom"


def test_every_setting_is_explained() -> None:
    assert all(len(field.metadata["help"]) > 15 for field in fields(ResponseConfig))


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown setting\(s\) direction; known are parameters, segments, directions"
    ):
        ResponseConfig.from_dict({"direction": 3})


@pytest.mark.parametrize(
    "settings",
    [
        dict(directions="all"),
        dict(directions=0),
        dict(directions=1.5),
        dict(directions=0.0),
        dict(directions=None),
        dict(directions=True),
        dict(segments=0),
        dict(segments="3"),
        dict(segments=2.0),
        dict(batch_size=0),
        dict(sample_rows=0),
        dict(curvature_samples=-1),
        dict(dtype="float64"),
        dict(horizon={"step_size": 0.1}),
        dict(horizon={"steps": 1, "damp": 0.1}),
        dict(folder=""),
        dict(folder="a/b"),
        dict(folder=".."),
        dict(folder="a\\b"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name}="):
        ResponseConfig(**settings)
