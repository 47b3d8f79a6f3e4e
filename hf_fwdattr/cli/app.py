"""The commands and their options; each is a few lines over the library."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ResponseConfig
from ..errors import AttributionError


app = typer.Typer(
    name="hf-fwdattr",
    help="Which training rows made a model say this? Response banks for fine-tuned Hugging Face models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def _fail(error: Exception) -> None:
    """One message, no traceback: what, where, and the cure."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)


def _probes(text: str | None) -> int | float | str | None:
    """A number where it is one; judged before anything is trained."""
    value: int | float | str | None = text
    for kind in (float, int):
        with contextlib.suppress(ValueError, TypeError):
            value = kind(text)  # type: ignore[arg-type]
    return None if value is None else ResponseConfig(directions=value).directions


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, its bank, and the page.")] = Path("fwdattr-demo"),
    model: Annotated[str | None, typer.Option(help="A causal language model: Hub id or local path.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset with a text column: Hub id or local file.")] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text of a row.")] = "text",
    source_column: Annotated[str | None, typer.Option(help="Column with the source of a row.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    rows: Annotated[int | None, typer.Option(help="Rows of the dataset to use at most.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to ask; may be given several times.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Of the fine-tune.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the fine-tune.")] = None,
    directions: Annotated[
        str | None, typer.Option(help="A number of directions, a variance to keep, or 'exact'.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Fine-tune again without the rows that are named.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a small model on facts, ask it, and show the rows and sources behind each answer."""
    from ..demo.run import run_demo

    try:
        run_demo(
            output, model=model, dataset=dataset, text_column=text_column, source_column=source_column,
            split=split, rows=rows, prompts=prompt or None, epochs=epochs, learning_rate=learning_rate,
            directions=_probes(directions), check=check, quiet=quiet,
        )  # fmt: skip
    except (AttributionError, OSError, ValueError) as error:
        _fail(error)


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the fine-tuned model or adapter.")],
    dataset: Annotated[
        str, typer.Argument(help="The training set: Hub id, local JSON/CSV/parquet file, or saved dataset.")
    ],
    config: Annotated[Path | None, typer.Option(help="JSON file with ResponseConfig settings.")] = None,
    record: Annotated[Path | None, typer.Option(help="Record that ResponseCallback left in a checkpoint.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the bank's folder goes; beside a local model by default.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text, if the dataset has no input_ids.")] = "text",
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    quiet: Quiet = False,
) -> None:
    """Make the response bank of a model that is already fine-tuned."""
    from .commands import build_for, silence

    try:
        with silence(quiet):
            folder = build_for(model, dataset, config, record, output, text_column, split, quiet)
    except (AttributionError, OSError, ValueError) as error:
        _fail(error)
    else:
        typer.echo(f"wrote {folder}")


@app.command()
def attribute(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model or adapter with its bank.")],
    prompt: Annotated[str, typer.Argument(help="What the model is asked.")],
    completion: Annotated[str | None, typer.Option(help="Attribute this output instead of generating one.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The training set, to show the rows themselves.")] = None,
    bank: Annotated[str | None, typer.Option(help="Where the bank is, if not beside the model.")] = None,
    text_column: Annotated[str, typer.Option(help="Column to show of a row.")] = "text",
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    top_k: Annotated[int, typer.Option(help="Rows to name on either side.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the output.")] = 16,
    readout: Annotated[str, typer.Option(help="auto, jvp or difference.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of products in forward mode: auto, full or half.")] = "auto",
    budget: Annotated[
        str | None,
        typer.Option(help="Forward passes for naming rows: a number, certain, or all of the bank's directions."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a model, and name the rows and sources behind what it says."""
    from .commands import attribute_with
    from .tables import attribution_table

    try:
        result = attribute_with(
            model,
            prompt,
            completion,
            dataset,
            bank,
            split,
            top_k,
            max_new_tokens,
            readout,
            text_column,
            budget,
            precision,
        )
    except (AttributionError, OSError, ValueError) as error:
        _fail(error)
    else:
        _show(result, as_json, lambda: attribution_table(prompt, result, text_column))


@app.command()
def evaluate(
    script: Annotated[Path, typer.Argument(help="Python file with make_trainer(seed) and queries.")],
    model: Annotated[str, typer.Argument(help="Folder of the fine-tuned model with its bank.")],
    halves: Annotated[int, typer.Option(help="Random halves of the rows, for the linear datamodeling score.")] = 32,
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 2,
    rows: Annotated[int, typer.Option(help="Rows left out one at a time, in the same order.")] = 0,
    sources: Annotated[int, typer.Option(help="Sources left out one at a time, in the same order.")] = 0,
    seed: Annotated[int, typer.Option(help="What make_trainer was given for the model's own run.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where outcomes are kept; a run that is killed goes on there.")] = Path(
        "fwdattr-retrained"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Retrain without rows, compare with what the bank says, and write the result into bank.json and the card."""
    from .commands import silence
    from .evaluation import evaluate_with
    from .tables import quality_table

    try:
        with silence(quiet):
            measured = evaluate_with(script, model, halves, seeds, rows, sources, seed, folder, quiet or as_json)
    except (AttributionError, OSError, ValueError) as error:
        _fail(error)
    else:
        _show(measured, as_json, lambda: quality_table(measured))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model with a bank, or of the bank itself.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    repo_type: Annotated[str, typer.Option(help="model, or dataset for a bank of its own.")] = "model",
    subfolder: Annotated[str, typer.Option(help="The bank's folder inside.")] = "fwdattr",
    as_json: Json = False,
) -> None:
    """Verify a bank and say what it holds; of one on the Hub only the manifest and headers are read."""
    from ..bank.bank import ResponseBank
    from .tables import bank_table

    try:
        bank = ResponseBank.from_pretrained(model, revision=revision, repo_type=repo_type, subfolder=subfolder)
        bank.inspect()
    except (AttributionError, OSError) as error:
        _fail(error)
    else:
        seen = (
            "verified" if bank.remote is None else f"{bank.remote}: sizes, hashes and headers agree, values not read"
        )
        _show(json.loads(bank.manifest.to_json()), as_json, lambda: bank_table(bank.manifest, seen))


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="Folder of a model with a bank, or of the bank itself.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub; made if there is none.")],
    repo_type: Annotated[str, typer.Option(help="model, or dataset for a bank of its own.")] = "model",
    pointer_in: Annotated[
        str | None, typer.Option(help="Model repository whose bank.json shall point to the bank in REPO.")
    ] = None,
    subfolder: Annotated[str, typer.Option(help="The bank's folder inside.")] = "fwdattr",
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    private: Annotated[bool | None, typer.Option(help="Make a new repository private.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of pushing.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Response bank",
) -> None:
    """Put a bank beside its model on the Hub, with a section in the card."""
    from ..bank.bank import ResponseBank

    try:
        address = ResponseBank.from_pretrained(model, subfolder=subfolder).push_to_hub(
            repo, repo_type=repo_type, pointer_in=pointer_in, subfolder=subfolder, revision=revision, private=private,
            create_pr=create_pr, commit_message=message,
        )  # fmt: skip
    except (AttributionError, OSError, ValueError) as error:
        _fail(error)
    else:
        typer.echo(f"pushed: {address}")


def _show(value: Any, as_json: bool, table: Any) -> None:
    if as_json:
        json.dump(value, sys.stdout, indent=2, default=str)
        sys.stdout.write("\n")
    else:
        table()
