"""What reaches a terminal: no control character, no character that its encoding lacks, JSON that parses strictly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_fwdattr.bank.printable import printable
from hf_fwdattr.bank.schema import Manifest
from hf_fwdattr.cli.chat import choose_chat, query_of
from hf_fwdattr.cli.tables import attribution_table, bank_table
from hf_fwdattr.cli.terminal import command_words, write_json
from hf_fwdattr.errors import QueryError
from tests.bank.test_bank import described
from tests.helpers.runs import tokenizer


EVIL = "a\x1b[31mb\x07\x9b2J\u202ec\u2066d\u200bé\udcff\x7f\r\n\U000e0041中"
HIDDEN = set("\x1b\x07\x9b\u202e\u2066\u200b\udcff\x7f\r\U000e0041")
RESULT = {
    "generated_text": EVIL,
    "examples": [
        {"row": 1234567, "score": 12.34567, "std": 0.02, "exact": True, "source": EVIL, "example": {"text": EVIL * 9}},
        {"row": 2, "score": -0.5, "std": None, "exact": False, "source": None, "example": None},
    ],
    "sources": [{"source": EVIL, "score": 1.0}],
}  # fmt: skip
PRINT = """
import json, sys
from hf_fwdattr.cli.tables import attribution_table
from hf_fwdattr.cli.terminal import echo, replace_unencodable
EVIL, RESULT = json.loads(sys.argv[1])
replace_unencodable()
attribution_table(EVIL, RESULT, "text")
echo(EVIL, err=True)
"""
COMMAND = [sys.executable, "-c", PRINT, json.dumps([EVIL, RESULT])]


def test_printable_shows_what_would_hide_and_keeps_what_is_text() -> None:
    shown = printable(EVIL, lines=True)
    assert not HIDDEN & set(shown)
    assert r"\x1b[31mb\x07\x9b2J\u202ec\u2066d\u200bé" in shown
    assert "\n" in shown
    assert "\n" not in printable(EVIL)
    text = "naïve 中文 नमस्ते क्\u200dष 👩\u200d🔬 — …"
    assert printable(text) == text


@pytest.mark.parametrize("columns", [20, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_tables_fit_every_terminal_and_encoding(columns: int, encoding: str) -> None:
    environment = os.environ | {"COLUMNS": str(columns), "PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    result = subprocess.run(COMMAND, capture_output=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    shown = result.stdout.decode(encoding)
    assert not HIDDEN & set(shown.replace("\r\n", "\n"))
    assert not HIDDEN & set(result.stderr.decode(encoding).replace("\r\n", "\n"))
    assert max(map(len, shown.splitlines())) <= columns
    for words in ("+12.3457", "-0.5000", "1234567", "sources"):
        assert words in shown
    assert "é" in shown or encoding == "ascii"


def test_a_terminal_gets_colours_of_ours_alone() -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    with subprocess.Popen(
        COMMAND,
        stdout=follower,
        stderr=follower,
        env=environment | {"TERM": "xterm"},
    ) as process:
        os.close(follower)
        content = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:
                break
            if not piece:
                break
            content += piece
    os.close(leader)
    assert process.returncode == 0, content
    shown = content.decode()
    assert "\x1b[3" in shown  # rich's own
    assert r"\x1b[31mb" in shown
    assert not (HIDDEN - {"\x1b", "\r"}) & set(shown)


def test_json_is_strict_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    value = {
        "nan": float("nan"), "inf": [float("inf"), -1.5], "text": EVIL, "bytes": b"caf\xe9", 3: np.float32("nan"),
        "array": np.arange(2), "tensor": torch.tensor(2.0), "path": Path("a"), "yes": True, "none": None,
    }  # fmt: skip
    write_json(value)
    written = capsys.readouterr().out

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    read = json.loads(written, parse_constant=refuse)
    assert written.isascii()
    assert not HIDDEN & set(written)
    assert read["nan"] is read["3"] is read["none"] is None
    assert (read["inf"], read["array"], read["tensor"], read["path"]) == ([None, -1.5], [0, 1], 2.0, "a")
    assert read["text"] == EVIL.replace("\udcff", "?")


def test_messages_name_the_options_of_the_command_line() -> None:
    said = command_words("accept it with allow_mismatch=['weights'], or verify_dataset=False; top_k=-1: no")
    assert said == "accept it with --allow-mismatch weights, or --no-verify; --top-k -1: no"
    assert (
        command_words("use readout='difference'; budget='some': no") == "use --readout difference; --budget some: no"
    )


class _Bank:
    """A bank's manifest and texts, as the choice of a template reads them."""

    def __init__(self, texts: list[str], columns: list[str]):
        self._texts, self.columns, self.text = texts, columns, bool(texts)
        self.manifest = self.dataset = self.privacy = self

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, row_indices: list[int]) -> list[str]:
        return [self._texts[index] for index in row_indices]


class _Asked:
    def __init__(self, template: str | None, texts: list[str], columns: list[str]):
        self.tokenizer = tokenizer()
        self.tokenizer.chat_template = template
        self.bank = _Bank(texts, columns)


CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.mark.parametrize(
    ("template", "texts", "columns", "wanted", "prompt", "chosen", "words"),
    [
        (None, [], [], None, "w1", False, None),
        (CHAT, [], [], None, "w1", True, "the tokenizer's chat template"),
        (CHAT, ["<user>w1<bot>w2"], [], None, "w1", True, "the rows are chats"),
        (CHAT, ["w1 w2"], [], None, "w1", False, "the rows are no chats"),
        (CHAT, ["w1 w2"], ["messages"], None, "w1", True, "the rows are chats"),
        (CHAT, [], [], None, "<user>w1<bot>", False, "rendered already"),
        (CHAT, [], [], False, "w1", False, "without"),
        (CHAT, ["w1 w2"], [], True, "w1", True, "through"),
    ],
)
def test_chat_template_follows_wish_then_rows(
    template: str | None, texts: list[str], columns: list[str], wanted: bool | None, prompt: str, chosen: bool,
    words: str | None,
) -> None:  # fmt: skip
    choice, note = choose_chat(wanted, prompt, _Asked(template, texts, columns))
    assert choice is chosen
    assert note is None if words is None else words in str(note)


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(QueryError, match="--chat: the tokenizer has no chat template"):
        choose_chat(True, "w1", _Asked(None, [], []))


def test_queries_of_chat_and_prompt() -> None:
    message = {"role": "user", "content": "a"}
    assert query_of("a", None, False) == {"prompt": "a"}
    assert query_of("a", "b", True) == {"prompt": [message], "completion": "b"}


def test_tables_accept_rows_that_are_no_dictionaries(capsys: pytest.CaptureFixture[str]) -> None:
    attribution_table("[b]", RESULT | {"examples": [RESULT["examples"][0] | {"example": "[red]"}]}, "text")  # type: ignore[operator]
    shown = capsys.readouterr().out
    assert "[red]" in shown  # as text, and not as markup
    assert "[b]" in shown


def test_notes_of_a_bank_are_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    bank_table(Manifest.model_validate(described(notes=["step 11: \x1b[31mred"]) | {"files": []}))
    shown = "".join(capsys.readouterr().out.split())
    assert r"scoresmaybewrong:step11:\x1b[31mred" in re.sub("[^ -~]", "", shown)
    assert "\x1b[31mred" not in shown
