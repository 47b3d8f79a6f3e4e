"""The section about a bank in its repository's card: made from `bank.json` alone, replaced and never doubled."""

import re
from typing import Any

import yaml
from huggingface_hub import RepoCard

from ..errors import BankError
from .printable import printable
from .schema import Manifest, Pointer


__all__ = ["TAG", "quality_text", "repository_in", "section", "with_section"]

TAG = "fwdattr"
_SECTION = re.compile(r"\n*<!-- fwdattr: begin -->.*?<!-- fwdattr: end -->\n*", re.DOTALL)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


_TEXT = """\
<!-- fwdattr: begin -->
## Response bank for training data attribution

{where} With it, `hf_fwdattr` scores the {scored}
by what they contributed to any output of this model, with forward passes only.

| | |
|---|---|
{facts}

**Query it.**

```python
import hf_fwdattr  # registers the task
from transformers import pipeline

attribute = pipeline("training-data-attribution", model="{repo_id}")
result = attribute("...", top_k=5, max_new_tokens=16){shown}
result["generated_text"], result["examples"], result["sources"]
```

Scores are in nats: how much of the output's log-likelihood training on a row added, to first order. Positive: the
row made the output likelier. {meaning}

**Verify it.** `hf-fwdattr inspect {repo_id}` compares the list of files, their sizes, hashes and headers with
`bank.json`. Loading the model checks its tracked weights against their sha256 above{rows_checked}.

**Privacy.** {text}{names}
{rows}

**Limits.** First order, along the run that really happened: another order of batches would have given other scores.
Good for rows and small sources, less so for large parts of the training set. What the base model knew before is
credited to no row.{truncation}
<!-- fwdattr: end -->
"""
_ROWS = """\
Rows are named by their ids and by hashes of their tokens, salted for this bank, so that no table of hashes made
elsewhere helps. Anyone who has the bank can still test a guess: a short or predictable row can be confirmed by trying
texts. Coordinates show which rows moved the weights alike."""
_WHOLE_ROWS = """ The bank also keeps each row's whole effect on the weights, which tells more
of a row than its coordinates do (`responses_budget=0` and a number of directions leave it out)."""
_SOURCES = """\
Of the rows it keeps the sums of whole sources: no row, no row id and no row hash. A source of one row is that row."""
_MEAN = """They are means over models that stop at the end of each of the run's segments:
closer to what other runs on these rows would show, and smaller than the changes of this model."""


def section(manifest: Manifest, repo_id: str, subfolder: str = "fwdattr", pointer: Pointer | None = None) -> str:
    """Return the card's section about a bank, in Markdown."""
    where = f"`{subfolder}/` holds a response bank."
    if pointer is not None:
        address = ("/datasets/" if pointer.repo_type == "dataset" else "/") + pointer.bank_repo
        where = f"`{subfolder}/bank.json` points to the response bank in\n[{pointer.bank_repo}]({address})"
        where += f" at commit `{pointer.revision}`."
    identified, with_text = manifest.privacy.rows == "identified", manifest.privacy.text
    lossy = f" {manifest.directions} directions do not keep everything: the lower the explained variance, the coarser"
    return _TEXT.format(
        repo_id=repo_id,
        where=where,
        scored="training rows and sources" if identified else "sources",
        facts="\n".join(f"| {label} | {value} |" for label, value in _facts(manifest).items()),
        shown="" if with_text else "  # dataset=... shows the rows themselves",
        meaning=_MEAN if manifest.averaging == "trajectory" else "Without the row it would change by minus the score.",
        rows_checked=", and `dataset=` checks\nevery row against its hash" if identified else "",
        text=(
            "The text of every row is in the bank, as its author chose (`include_text`); it is\ndownloaded when rows "
            "are shown." if with_text else "No text of the rows is in the bank."
        ),
        names=" The names of the sources are." if manifest.sources else "",
        rows=_ROWS + _WHOLE_ROWS * bool(manifest.row_codes or manifest.exact) if identified else _SOURCES,
        truncation="" if manifest.exact else f"{lossy} the\nranking.",
    )  # fmt: skip


def _facts(manifest: Manifest) -> dict[str, str]:
    """Return the rows of the section's table."""
    dataset, sources = _dataset(manifest), len(manifest.sources)
    weights = f"{len(manifest.parameters)} tensors, {manifest.size:,} parameters, sha256 `{manifest.weights[:16]}`"
    exact, of_sources = " (exact)" * manifest.exact, ", and one for each source" * bool(manifest.source_directions)
    facts = {
        "attributed to": f"{manifest.dataset.rows:,} rows{dataset}" + f", {sources:,} sources" * bool(sources),
        "tracked weights": weights,
        "base model": _code(manifest.model, manifest.revision),
        "objective, optimizer": (
            f"{_plain(manifest.objective)}, {_plain(manifest.optimizer)}, {len(manifest.segments)} segments"
        ),
        "directions": f"{manifest.directions}{exact}{of_sources}",
        "explained variance": f"{manifest.explained_variance:.3f} of held-out scores",
    }
    if manifest.error_projections:
        explained = f"{manifest.predictor_explained_variance or 0:.2f} of the variance of training rows' scores"
        facts["gradient predictor"] = f"one forward pass explains {explained}"
    elif manifest.predictor_missing:
        facts["gradient predictor"] = f"none: {_plain(manifest.predictor_missing)}"
    if manifest.row_codes:
        facts["row codes"] = f"every row's response in {manifest.row_code_bits} bits a number"
    if manifest.notes:
        facts["notes of the training"] = "scores may be wrong: " + "; ".join(_plain(note) for note in manifest.notes)
    quality = _plain(quality_text(manifest.quality)) or "not measured"
    return facts | {"measured quality": quality, "size": f"{manifest.bytes / 1e6:,.1f} MB"}


def with_section(
    text: str, manifest: Manifest, repo_id: str, pointer: Pointer | None = None, subfolder: str = "fwdattr"
) -> str:
    """Return a card with the bank's section (in the place of an older one or at the end), tag and dataset.

    Args:
        text (`str`): the card so far, with its YAML header; may be empty.

    Raises:
        BankError: the header is not valid YAML of a card.
    """
    text = text.removeprefix("\ufeff")  # a byte order mark, which editors leave, hides the header
    try:
        headed = text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}"
        card = RepoCard(headed, ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        raise BankError(f"the header of README.md is no valid YAML ({str(error)[:200]}). Correct it first") from error
    card.data["tags"] = _joined(card.data.get("tags"), TAG)
    if manifest.dataset.repo is not None and _REPOSITORY.fullmatch(manifest.dataset.repo):
        card.data["datasets"] = _joined(card.data.get("datasets"), manifest.dataset.repo)
    new = section(manifest, repo_id, subfolder, pointer)
    body = card.text
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: f"\n\n{new}\n", body, count=1).rstrip() + "\n"
    else:
        body = f"{body.rstrip()}\n\n{new}"
    card.text = body
    return f"---\n{card.data.to_yaml()}\n---\n\n{body.lstrip()}"


def repository_in(text: str) -> str | None:
    """Return the repository that a card's section about a bank names; None if it has no such section."""
    match = _SECTION.search(text)
    named = None if match is None else re.search(r'model="([^"]+)"', match.group())
    return None if named is None else named.group(1)


def _joined(values: Any, more: str) -> list[str]:
    present = [values] if isinstance(values, str) else list(values or [])
    return present if more in present else [*present, more]


def _dataset(manifest: Manifest) -> str:
    dataset = manifest.dataset
    if dataset.repo is None:
        return ""
    extra = [_plain(value) for value in (dataset.config, dataset.split) if value and value != "default"]
    parts = f" ({', '.join(extra)})" if extra else ""
    commit = f" at `{_plain(dataset.revision)}`" if dataset.revision else ""
    return f" of `{_plain(dataset.repo)}`{parts}{commit}"


def quality_text(quality: dict[str, Any]) -> str:
    """Return measured figures in one line: `LDS 0.89, self-check (slope 0.93, sources 4)`."""
    parts = []
    for key, value in quality.items():
        name = key.replace("_", " ")
        parts.append(f"{name} ({quality_text(value)})" if isinstance(value, dict) else f"{name} {value}")
    return ", ".join(parts)


def _code(name: str | None, revision: str | None) -> str:
    if name is None or name.startswith(("/", ".", "~")) or re.match(r"[A-Za-z]:\\", name):
        return "not on the Hub"  # a path on the author's machine is not published
    return f"`{_plain(name)}`" + (f" at `{_plain(revision)}`" if revision else "")


def _plain(value: str) -> str:
    """Return text that cannot leave its cell of a table, become HTML, a link or an image, nor reorder its line."""
    return re.sub(r"[`|<>\[\]!*&\s]+", " ", printable(value)).replace("\\", "\\\\").strip()
