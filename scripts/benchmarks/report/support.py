"""The list of classes in the trainer's README, from the result file of the sweep."""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any


__all__ = ["BEGIN", "END", "PAGE", "section", "updated"]

PAGE = Path(__file__).parents[3] / "hf_fwdattr" / "trainer" / "README.md"
BEGIN, END = "<!-- sweep: `python -m benchmarks sweep_list` -->", "<!-- end of sweep -->"
_TRIED = ("right", "refused", "wrong", "late", "crash")
# Causes of refusals in the list's words, by what their messages have in common.
_CAUSES = (
    (r"in training mode", "layers draw at random while they train"),
    (r"Pad on the right", "padding on the left moves a row (learned positions, or states that read the padding)"),
    (r"gradient alone|rows influence", "a row's gradient depends on the rows beside it"),
    (r"the model's loss", "the model's loss is not the likelihood of its logits"),
    (r"router", "the router loss is too large to be left out"),
    (r"logits .* positions|unknown which label", "logits and labels differ in length"),
    (r"objective=", "no known likelihood"),
)


def updated(page: str, lines: list[dict[str, Any]]) -> str:
    """Return the page with the list of these lines between its two marks.

    Raises:
        ValueError: the page has no marks.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE}: the marks of the list are not there once each. Add {BEGIN} and {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{section(lines)}{END}{rest.split(END)[1]}"


def section(lines: list[dict[str, Any]]) -> str:
    """Return the list: a table of counts, the refusals by cause, and the classes."""
    tried = [line for line in lines if line["verdict"] in _TRIED]
    classes = {(line["kind"], line["class"]) for line in tried}
    cases = list(dict.fromkeys(line["case"] for line in tried))
    counts = Counter((line["case"], line["verdict"]) for line in tried)
    causal = sum(kind == "causal" for kind, _ in classes)
    failing = sum(line["verdict"] not in ("right", "refused") for line in tried)
    text = [
        f"{len(classes)} classes of transformers {lines[0]['transformers']}, {causal} causal language models and "
        f"{len(classes) - causal} sequence classifiers, were built tiny, trained and asked: {len(tried)} trainings.",
        "*Right* means that the scores of all rows sum to what training changed, to 1 %; *refused* means before the",
        "first step. " + (f"{failing} are neither." if failing else "None was anything else."), "",
        "| training | right | refused | neither |", "|---|---|---|---|",
        *(
            f"| {case} | {counts[case, 'right']} | {counts[case, 'refused']} | "
            f"{sum(counts[case, verdict] for verdict in _TRIED[2:])} |" for case in cases
        ), "",
        *_refusals(tried), *_failures(tried), *_classes(tried),
    ]  # fmt: skip
    return "\n".join(text) + "\n"


def _refusals(lines: list[dict[str, Any]]) -> list[str]:
    """Return one line for each cause, with its cases and classes."""
    causes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["verdict"] == "refused":
            causes[_cause(line["message"])][line["case"]].append(line["class"])
    text = []
    for cause, cases in causes.items():
        text += [f"* Refused: {cause}."]
        text += [f"  * {case}: {_folded(names)}" for case, names in cases.items()]
    return [*text, ""] if text else []


def _cause(message: str) -> str:
    return next((words for pattern, words in _CAUSES if re.search(pattern, message)), message.partition(". ")[0])


def _failures(lines: list[dict[str, Any]]) -> list[str]:
    failed = [line for line in lines if line["verdict"] not in ("right", "refused")]
    return [
        *(f"* Neither: {line['class']}, {line['case']}: {line.get('message') or 'error {error:.1%}'.format(**line)}"
          for line in failed), *([""] if failed else []),
    ]  # fmt: skip


def _classes(lines: list[dict[str, Any]]) -> list[str]:
    """Return the classes by the cases in which all of them were right."""
    by_cases: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in dict.fromkeys(line["class"] for line in lines):
        right = tuple(line["case"] for line in lines if line["class"] == name and line["verdict"] == "right")
        if right:
            by_cases[right].append(name)
    text = ["<details><summary>Right, by class</summary>", ""]
    for cases, names in sorted(by_cases.items(), key=lambda item: -len(item[1])):
        text += [f"* {', '.join(cases)}: {_folded(names)}"]
    return [*text, "", "</details>"]


def _folded(names: list[str]) -> str:
    """Return names without the ending that most have."""
    endings = ("ForCausalLM", "ForSequenceClassification")
    return ", ".join(sorted(name.replace(endings[0], "").replace(endings[1], " (classifier)") for name in names))
