"""The section about a bank in its repository's card: rendered from `bank.json` alone, replaced and never doubled."""

import re
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import RepoCard
from jinja2 import Environment, StrictUndefined

from ..errors import BankError
from .schema import Manifest, Pointer


TAG = "fwdattr"
_BEGIN, _END = "<!-- fwdattr: begin -->", "<!-- fwdattr: end -->"
_SECTION = re.compile(rf"\n*{_BEGIN}.*?{_END}\n*", re.DOTALL)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def section(manifest: Manifest, repo_id: str, subfolder: str = "fwdattr", pointer: Pointer | None = None) -> str:
    """What the card says about a bank, in Markdown."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string((files(__package__) / "section.md.jinja").read_text(encoding="utf-8"))
    text = template.render(
        manifest=manifest, repo_id=repo_id, subfolder=subfolder, pointer=pointer, privacy=manifest.privacy,
        dataset=_dataset(manifest), base=_code(manifest.model, manifest.revision), quality=_quality(manifest),
        size=sum(file.size for file in manifest.files),
        prefix="/datasets/" if pointer is not None and pointer.repo_type == "dataset" else "/",
    )  # fmt: skip
    return f"{_BEGIN}\n{text.strip()}\n{_END}\n"


def with_section(
    text: str, manifest: Manifest, repo_id: str, pointer: Pointer | None = None, subfolder: str = "fwdattr"
) -> str:
    """A card with the bank's section, in the place of an older one or at the end, and what its header needs.

    Args:
        text (`str`): the card so far, with its YAML header; may be empty.

    Raises:
        BankError: the header is not YAML that a card can have.
    """
    try:
        headed = text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}"
        card = RepoCard(headed, ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        raise BankError(f"the header of README.md is no valid YAML ({str(error)[:200]}); mend it first") from error
    card.data["tags"] = _joined(card.data.get("tags"), TAG)
    if manifest.dataset.repo is not None and _REPOSITORY.fullmatch(manifest.dataset.repo):
        card.data["datasets"] = _joined(card.data.get("datasets"), manifest.dataset.repo)
    own = section(manifest, repo_id, subfolder, pointer)
    body = card.text
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: f"\n\n{own}\n", body, count=1).rstrip() + "\n"
    else:
        body = f"{body.rstrip()}\n\n{own}"
    card.text = body
    return f"---\n{card.data.to_yaml()}\n---\n\n{body.lstrip()}"


def repository_in(text: str) -> str | None:
    """The repository that a card's section about a bank names; None where it has no such section."""
    found = _SECTION.search(text)
    named = None if found is None else re.search(r'model="([^"]+)"', found.group())
    return None if named is None else named.group(1)


def _joined(values: Any, more: str) -> list[str]:
    known = [values] if isinstance(values, str) else list(values or [])
    return known if more in known else [*known, more]


def _dataset(manifest: Manifest) -> str:
    known = manifest.dataset
    if known.repo is None:
        return ""
    extra = [_plain(value) for value in (known.config, known.split) if value and value != "default"]
    at = f" at `{_plain(known.revision)}`" if known.revision else ""
    return f"`{_plain(known.repo)}`" + (f" ({', '.join(extra)})" if extra else "") + at


def _quality(manifest: Manifest) -> str:
    return _plain(quality_text(manifest.quality)) or "not measured"


def quality_text(quality: dict[str, Any]) -> str:
    """Measured figures in one line: `LDS 0.89, self-check (slope 0.93, sources 4)`."""
    parts = []
    for key, value in quality.items():
        name = key.replace("_", " ")
        parts.append(f"{name} ({quality_text(value)})" if isinstance(value, dict) else f"{name} {value}")
    return ", ".join(parts)


def _code(name: str | None, revision: str | None) -> str:
    if name is None or name.startswith(("/", ".", "~")) or re.match(r"[A-Za-z]:\\", name):
        return "not on the Hub"  # a path of somebody's machine is nobody's business
    return f"`{_plain(name)}`" + (f" at `{_plain(revision)}`" if revision else "")


def _plain(value: str) -> str:
    """Text that cannot leave its cell of a table, nor become HTML."""
    return re.sub(r"[`|<>\s]+", " ", value).strip()
