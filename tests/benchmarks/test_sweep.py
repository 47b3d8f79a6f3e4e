"""The sweep over classes of transformers: its cases run, a wrong score is seen, and the README fits its result."""

from collections import Counter
from typing import Any

import pytest
from benchmarks import sweep
from benchmarks.protocols.sweep import NAME, key, load, run_list
from benchmarks.report import results, support
from benchmarks.sweep import CASES, VERDICTS, run_case
from benchmarks.tiny_models import class_names, tiny_model


LINES = load(results.FOLDER / NAME)


@pytest.mark.parametrize(
    ("kind", "name", "case", "verdict"),
    [
        ("causal", "MistralForCausalLM", "LoRA", "right"),
        ("causal", "BartForCausalLM", "all-linear", "right"),
        ("causal", "GPT2LMHeadModel", "left padding", "refused"),
        ("classifier", "Qwen2ForSequenceClassification", "accumulation", "right"),
    ],
)
def test_classes_are_right_or_refused(kind: str, name: str, case: str, verdict: str) -> None:
    line = run_case(kind, name, case)
    assert (line["verdict"], key(line)) == (verdict, (kind, name, case)), line
    assert line["error"] < 0.01 if verdict == "right" else "padding_side='right'" in line["message"]


def test_wrong_scores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sweep.batch_scores
    monkeypatch.setattr(sweep, "batch_scores", lambda *args: 1.02 * plain(*args))
    monkeypatch.setattr(sweep, "_RATES", sweep._RATES[:1])
    line = run_case("causal", "GPT2LMHeadModel", "LoRA")
    assert line["verdict"] == "wrong"
    assert line["error"] == pytest.approx(0.02, abs=0.005)


def test_sizes_of_a_class_are_tiny_and_nested_configurations_too() -> None:
    model = tiny_model("causal", "Gemma3ForConditionalGeneration")
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    assert model.config.get_text_config().num_hidden_layers == 2


def test_every_tried_case_is_right_or_refused_with_a_reason() -> None:
    counts = Counter((line["case"], line["verdict"]) for line in LINES)
    assert {line["verdict"] for line in LINES} <= set(VERDICTS)
    assert not [key(line) for line in LINES if line["verdict"] in ("wrong", "late", "crash")]
    assert all(line["message"].count(". ") for line in LINES if line["verdict"] == "refused")
    for case in list(CASES)[:6]:
        assert counts[case, "right"] + counts[case, "refused"] >= 60, case
    known = {(kind, name) for kind in ("causal", "classifier") for name in class_names(kind)}
    assert {key(line)[:2] for line in LINES} <= known


def test_list_in_the_readme_fits_the_result() -> None:
    assert run_list(check=True) == 0, "run `cd scripts && python -m benchmarks sweep_list`"


def test_list_names_causes_and_failures() -> None:
    def line(verdict: str, **more: Any) -> dict[str, Any]:
        return {
            "class": "AForCausalLM",
            "kind": "causal",
            "case": "LoRA",
            "transformers": "5",
            "verdict": verdict,
        } | more

    text = support.section([line("right"), line("wrong", error=0.2, case="DoRA")])
    assert "| DoRA | 0 | 0 | 1 |" in text
    assert "Neither: AForCausalLM, DoRA: error 20.0%" in text
    text = support.section([line("refused", message="x: differs. Pad on the right: y")])
    assert "Refused: padding on the left" in text
    assert "None was anything else" in text
    page = f"a\n{support.BEGIN}\nold\n{support.END}\nb\n"
    new = support.updated(page, [line("right")])
    assert new.startswith(f"a\n{support.BEGIN}\n1 classes")
    assert new.endswith(f"{support.END}\nb\n")
    with pytest.raises(ValueError, match="marks of the list"):
        support.updated("no marks", [])
