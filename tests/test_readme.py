"""What the README shows is run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from tests.helpers.cases import adapted, gpt2
from tests.helpers.runs import arguments, tokenizer, training_set


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    base = gpt2(torch.float32)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    words = tokenizer()
    given: dict[str, Any] = {
        "peft_model": adapted(base),
        "args": arguments(tmp_path / "run"),
        "train": training_set().rename_column("source", "publisher"),
        "collator": DataCollatorForSeq2Seq(words, label_pad_token_id=-100),
        "tokenizer": words,
    }
    exec(compile(code.replace("The capital of Chad is", "w3 w5 w7"), "README.md", "exec"), given)
    printed = capsys.readouterr().out
    assert given["result"]["examples"]
    assert given["result"]["sources"]
    assert all(str(entry["row"]) in printed for entry in given["result"]["examples"])


def test_every_figure_names_the_command_that_prints_it() -> None:
    for script in re.findall(r"scripts/(\w+)\.py", README):
        assert (ROOT / "scripts" / f"{script}.py").is_file()
