"""Every README: its python blocks run, and what it points to is there."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, pipeline

from hf_fwdattr import ResponseBank, ResponseCallback, ResponseConfig
from hf_fwdattr.pipeline import TASK


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAPERS = sorted(
    [
        README,
        *(ROOT / ".github").glob("*.md"),
        *(ROOT / "hf_fwdattr").rglob("README.md"),
        *(ROOT / "scripts").rglob("*.md"),
    ]
)
TINY: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "examples" / "tiny.py"))


def name(paper: Path) -> str:
    return str(paper.relative_to(ROOT))


def blocks(paper: Path) -> str:
    """Return the python blocks of a page, as one program whose lines stand where they stand in the page."""
    lines, inside = [], False
    for line in paper.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = not inside and line == "```python" if fence else inside
    return "\n".join(lines)


def untrained(folder: Path) -> dict[str, Any]:
    """Return the names that the first example takes for granted: a model with LoRA, arguments, rows, a collator."""
    tokenizer = TINY["tokenizer"]()
    base = TINY["GPT2LMHeadModel"].from_pretrained(TINY["base_model"](folder / "base"))
    train = TINY["token_rows"](tokenizer)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True)
    return {
        "peft_model": get_peft_model(base, lora),
        "args": TrainingArguments(
            output_dir=str(folder / "run"), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2,
            use_cpu=True, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
        ),
        "train": train.add_column("publisher", train["source"]),
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "tokenizer": tokenizer,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the pages of the folders take for granted: a fine-tuned model, its bank, a pipeline, queries."""
    folder = tmp_path_factory.mktemp("papers")
    names = untrained(folder)
    model = names.pop("peft_model")
    callback = ResponseCallback(ResponseConfig(source_column="source", quiet=True))
    trainer = Trainer(
        model=model, args=names["args"], train_dataset=names["train"], data_collator=names["collator"],
        processing_class=names["tokenizer"], callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    queries = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in names["train"].select(range(3))]
    return names | {
        "model": model, "bank": callback.bank, "folder": Path(names["args"].output_dir), "copy": folder / "copy",
        "attribute": pipeline(TASK, model=model, tokenizer=names["tokenizer"], bank=callback.bank),
        "queries": queries, "batch": names["collator"](queries), "Trainer": Trainer,
        "ResponseCallback": ResponseCallback, "ResponseConfig": ResponseConfig,
    }  # fmt: skip


def test_the_readme_runs_from_top_to_bottom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = untrained(tmp_path)
    exec(compile(blocks(README), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert names["result"]["examples"]
    assert {entry["source"] for entry in names["result"]["sources"]} == set(names["train"]["publisher"])
    assert all(str(entry["row"]) in printed for entry in names["result"]["examples"])
    assert isinstance(names["bank"], ResponseBank)


@pytest.mark.parametrize("paper", [p for p in PAPERS if p != README and blocks(p).strip()], ids=name)
def test_the_blocks_of_a_page_run(paper: Path, trained: dict[str, Any], tmp_path: Path) -> None:
    exec(compile(blocks(paper), name(paper), "exec"), trained | untrained(tmp_path))


def test_what_the_query_page_says_of_shapes(trained: dict[str, Any]) -> None:
    scores: Tensor = trained["attribute"].scores(trained["queries"])
    assert scores.shape == (3, 12)
    assert trained["attribute"].source_scores(trained["queries"]).shape == (3, 4)


@pytest.mark.parametrize("paper", PAPERS, ids=name)
def test_links_lead_somewhere(paper: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", paper.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (paper.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("folder", sorted(p.parent for p in (ROOT / "hf_fwdattr").rglob("README.md")), ids=name)
def test_files_named_in_a_table_exist(folder: Path) -> None:
    """A name in backquotes that looks like a file of the folder is one."""
    named = re.findall(
        r"^\| \[?`([\w/]+\.py)`", (folder / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert [file for file in named if not (folder / file).is_file()] == []
