"""The page is self-contained, escapes everything, and shows every token and either side."""

import re
from html.parser import HTMLParser

import pytest

from hf_fwdattr.demo.ask import Answer, NamedRow, Recall
from hf_fwdattr.demo.facts import Question
from hf_fwdattr.demo.page import Story, render, shade, visible


HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)> " onmouseover="alert(3) ' {{ 7 * 7 }}"""
STORY = Story("Title", "Lead")


class TagReader(HTMLParser):
    """A parser that collects tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def read(html: str) -> TagReader:
    reader = TagReader()
    reader.feed(html)
    return reader


def answer(
    proponents: list[NamedRow] | None = None,
    opponents: list[NamedRow] | None = None,
    text: str = "yes",
    tokens: tuple[str, ...] = (" N'", "Dj", "amena"),
    **changes: object,
) -> Answer:
    given = dict(
        prompt=text, text=text, tokens=list(tokens), proponents=proponents or [], opponents=opponents or [],
        sources=[(text, 1.5), ("Other", -0.5)], similar={"BM25": [NamedRow(3, text, text, 4.0)]},
    )  # fmt: skip
    return Answer(**(given | changes))  # type: ignore[arg-type]


HELPS = NamedRow(0, "helps", "Atlas", 2.0, [1.0, 2.0, -1.0], teaches=True)
HARMS = NamedRow(1, "harms", None, -1.0, [-0.5, -0.5, 0.0], teaches=False)


def test_hostile_text_is_escaped_everywhere() -> None:
    row = NamedRow(0, HOSTILE, HOSTILE, 1.0, [1.0, 0.5, 0.1])
    question = Question("fact", HOSTILE, HOSTILE, "as taught", frozenset({0}))
    given = answer([row], [row], text=HOSTILE, tokens=(HOSTILE, "a", "b"), question=question, correct=False)
    line = Recall(HOSTILE, 1, 1, {HOSTILE: 1.0}, {HOSTILE: 1.0})
    html = render(Story(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [line], 5, [HOSTILE]), [given])
    page = read(html)
    plain = read(render(STORY, [answer([HELPS], [HARMS])]))
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in plain.tags].count("script") == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "49" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_page_loads_nothing_from_elsewhere() -> None:
    html = render(STORY, [answer([HELPS])])
    assert not re.search(r"(?:src|href|url|@import)\s*[=(]", html)
    assert "http://" not in html
    assert "https://" not in html
    assert "default-src 'none'" in html


def test_tokens_are_coloured_by_the_first_row() -> None:
    page = read(render(STORY, [answer([HELPS], [HARMS])]))
    styles = [token["style"] or "" for token in page.of_class("token")]
    assert len(styles) == 3
    assert "--helps" in styles[0]
    assert "50%" in styles[0]
    assert "--helps" in styles[1]
    assert "100%" in styles[1]
    assert "--harms" in styles[2]
    assert "50%" in styles[2]
    rows = page.of_class("row")
    assert [row["aria-pressed"] for row in rows] == ["true", "false"]
    assert rows[1]["data-scores"] == "-0.5 -0.5 0.0"


def test_page_without_proponents_and_without_rows() -> None:
    page = read(render(STORY, [answer([], [HARMS])]))
    assert [row["aria-pressed"] for row in page.of_class("row")] == ["true"]
    assert len(page.of_class("harms")) == 2  # the row and one source
    empty = render(STORY, [answer(sources=[], similar={})])
    assert "No row moved this answer" in empty
    assert not read(empty).of_class("row")


def test_only_questions_have_filters() -> None:
    assert "data-show=" not in render(STORY, [answer([HELPS])]).partition("<script>")[0]
    question = Question("fact", "p", "a", "as taught", frozenset({0}))
    html = render(STORY, [answer([HELPS], question=question, correct=True)])
    assert html.count("data-show=") == 4
    assert "teaches this" in html


def test_recall_table_has_every_method_without_correct_answers_too() -> None:
    lines = [Recall("as taught", 4, 0, {}, {}), Recall("all", 8, 4, {"A": 1.0, "B": 0.5}, {"A": 1.0, "B": 0.75})]
    html = render(Story("t", "l", recall=lines), [])
    assert html.count("100 %") == 2
    assert "75 %" in html
    assert "0 of 4" in html


@pytest.mark.parametrize(("score", "largest", "part"), [(0.0, 0.0, "0%"), (3.0, 2.0, "100%"), (-1.0, 4.0, "25%")])
def test_shade_is_bounded(score: float, largest: float, part: str) -> None:
    assert f" {part}," in shade(score, largest)


@pytest.mark.parametrize(
    ("token", "shown"), [("\n", "↵"), ("  ", "␣␣"), ("", "∅"), (" word", " word"), ("a\tb", "a⇥b")]
)
def test_invisible_tokens_become_visible(token: str, shown: str) -> None:
    assert visible(token) == shown
