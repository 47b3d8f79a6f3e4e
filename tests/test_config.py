from typing import Any

import pytest

from hf_fwdattr import ResponseConfig


def test_config_survives_json() -> None:
    config = ResponseConfig(parameters=["q_proj"], directions=0.9, horizon={"steps": 3, "step_size": 0.1})
    assert ResponseConfig.from_dict(config.to_dict()) == config
    assert list(config.to_dict()) == list(ResponseConfig.model_fields)


def test_function_as_objective_is_called_custom() -> None:
    assert ResponseConfig(objective=lambda *_: None).to_dict()["objective"] == "custom"


def test_every_setting_is_described() -> None:
    for field in ResponseConfig.model_fields.values():
        assert (field.description or "").endswith(".")


def test_replace_validates_and_leaves_the_original() -> None:
    config = ResponseConfig(directions=4)
    assert (config.replace(directions=8).directions, config.directions) == (8, 4)
    with pytest.raises(ValueError, match=r"^directions=0: "):
        config.replace(directions=0)


def test_unknown_setting_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown setting\(s\) direction\. Known are parameters, segments, directions"
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
        dict(averaging="last"),
        dict(horizon={"step_size": 0.1}),
        dict(horizon={"steps": 1, "damp": 0.1}),
        dict(include_text=""),
        dict(folder=""),
        dict(folder="a/b"),
        dict(folder=".."),
        dict(folder="a\\b"),
    ],
    ids=str,
)
def test_value_out_of_range_is_named_with_reason_and_meaning(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"^{name}=") as raised:
        ResponseConfig(**settings)
    text = str(raised.value)
    assert text.startswith(f"{name}={value!r}: it should be ")
    assert text.endswith(" ".join((ResponseConfig.model_fields[name].description or "?").split()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(private_rows=True), "private_rows=True keeps sources only. Name them with source_column"),
        (dict(private_rows=True, source_column="s", self_check=2), "self_check=2 leaves out rows"),
        (dict(private_rows=True, source_column="s", include_text=True), "include_text=True keeps the rows' text"),
    ],
)
def test_settings_that_exclude_each_other_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ResponseConfig(**settings)
