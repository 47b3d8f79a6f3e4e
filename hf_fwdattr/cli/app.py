"""The commands and their options. Whatever imports torch is imported inside a command."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AttributionError, QueryError
from .terminal import command_words, echo, write_json


__all__ = ["app"]

app = typer.Typer(
    name="hf-fwdattr",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXTRAS = {"rich": "cli", "bm25s": "demo", "jinja2": "demo", "scipy": "eval"}
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and notes.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Progress bars and notices of other libraries too.")]
TextColumn = Annotated[str, typer.Option(help="Column with the text of a row.")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
Subfolder = Annotated[str, typer.Option(help="The bank's folder inside.")]
RepoType = Annotated[str, typer.Option(help="model, or dataset for a bank of its own.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        echo(f"hf-fwdattr {version('hf-fwdattr')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Which training rows made a model say this? Response banks for fine-tuned Hugging Face models."""


@contextmanager
def _plain_errors(verbose: bool = False) -> Iterator[None]:
    """Turn an error into one message and exit code 1; only an unexpected one has a traceback, where `verbose`."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        _fail(f"{library} is not installed. Run: pip install 'hf-fwdattr[{_EXTRAS[library]}]'")
    except (AttributionError, OSError, ValueError) as error:
        _fail(str(error) or type(error).__name__)
    except Exception as error:
        if verbose:
            raise
        cause = error.__cause__ or error.__context__
        why = f" ({type(cause).__name__}: {cause})" if cause is not None else ""
        _fail(f"{type(error).__name__}: {error}{why}. This was not foreseen. --verbose shows where it happened")


def _fail(message: str) -> None:
    echo(f"error: {command_words(message)}", err=True)
    raise typer.Exit(1)


def _parse_directions(text: str | None) -> Any:
    """Parse and check the number of directions, before anything is trained."""
    from ..config import ResponseConfig

    value: Any = text
    for kind in (float, int):
        with suppress(ValueError, TypeError):
            value = kind(text)  # type: ignore[arg-type]
    return None if value is None else ResponseConfig(directions=value).directions


def _parse_budget(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


@contextmanager
def _only_json(as_json: bool) -> Iterator[None]:
    """Send to standard error what others print meanwhile, where standard output is for one JSON object."""
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


def _text(name: str, value: str | None) -> None:
    """Refuse an argument whose bytes were no text."""
    if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
        raise QueryError(f"{name}: {value!r}. Its bytes are not UTF-8. Write it in UTF-8, or set a UTF-8 locale")


def _show(value: Any, as_json: bool, print_table: Callable[[], None]) -> None:
    if as_json:
        write_json(value)
    else:
        print_table()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, its bank, and the page.")] = Path("fwdattr-demo"),
    model: Annotated[str | None, typer.Option(help="A causal language model: Hub id or local path.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset with a text column: Hub id or local file.")] = None,
    text_column: TextColumn = "text",
    source_column: Annotated[str | None, typer.Option(help="Column with the source of a row.")] = None,
    split: Split = "train",
    rows: Annotated[int | None, typer.Option(help="Largest number of rows of the dataset.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the fine-tune.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the fine-tune.")] = None,
    directions: Annotated[
        str | None, typer.Option(help="A number of directions, a variance to explain, or 'exact'.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Fine-tune again without the rows that are named.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a small model on facts, ask it, and show the rows and sources behind each answer."""
    with _plain_errors(verbose):
        checked = _parse_directions(directions)
        from ..demo.run import DemoSettings, TextRows, run_demo
        from .commands import quiet_libraries
        from .datasets import DatasetSource

        with quiet_libraries(verbose):
            texts = None
            if dataset is not None:
                texts = TextRows(dataset, *DatasetSource(dataset, split, text_column).texts(source_column, rows))
            settings = DemoSettings(
                model=model, rows=texts, prompts=prompt or None, epochs=epochs, learning_rate=learning_rate,
                directions=checked, check=check, quiet=quiet,
            )  # fmt: skip
            run_demo(output, settings)


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
    text_column: TextColumn = "text",
    split: Split = "train",
    revision: Revision = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make the response bank of a model that is already fine-tuned."""
    with _plain_errors(verbose):
        from ..config import ResponseConfig
        from . import commands
        from .datasets import DatasetSource

        settings = ResponseConfig.from_dict(commands.read_settings(config) if config else {})
        settings.quiet = settings.quiet or quiet
        with commands.quiet_libraries(verbose):
            source = DatasetSource(dataset, split, text_column)
            folder = commands.build(commands.ModelSource(model, revision), source, settings, record, output)
        echo(f"wrote {folder}")


@app.command()
def attribute(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model or adapter with its bank.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    completion: Annotated[str | None, typer.Option(help="Attribute this output instead of generating one.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The training set, to show the rows themselves.")] = None,
    bank: Annotated[str | None, typer.Option(help="Where the bank is, if not beside the model.")] = None,
    text_column: TextColumn = "text",
    split: Split = "train",
    top_k: Annotated[int, typer.Option(help="Rows to name on either side.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Largest length of the output.")] = 16,
    readout: Annotated[str, typer.Option(help="Directional derivatives: auto, jvp, difference, backward.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of their products: auto, full or half.")] = "auto",
    budget: Annotated[
        str | None, typer.Option(help="Forward passes for naming rows: a number, 'adaptive', or 'all'.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask through the chat template, or not; by default as the rows are."),
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--no-do-sample", help="Sample the output; by default as the model."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(help="weights, tokenizer or dataset may differ from the bank's; may be given several times."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the dataset with the bank, or take its rows as is."),
    ] = True,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ask a model, and name the rows and sources behind its answer."""
    with _plain_errors(verbose):
        _text("PROMPT", prompt)
        _text("--completion", completion)
        for part in allow_mismatch or []:
            if part not in ("weights", "tokenizer", "dataset"):
                raise QueryError(f"--allow-mismatch: {part}. It can be weights, tokenizer or dataset")
        from . import commands
        from .chat import prepare_input
        from .datasets import DatasetSource
        from .tables import attribution_table

        sampling = commands.sampling(do_sample, temperature, seed, given=completion is not None)
        with commands.quiet_libraries(verbose), _only_json(as_json):
            pipeline = commands.open_pipeline(
                commands.ModelSource(model, revision), bank, readout=readout, precision=precision,
                allow_mismatch=allow_mismatch or [],
            )  # fmt: skip
            rows = None if dataset is None else DatasetSource(dataset, split, text_column).rows()
            asked, settings, note = prepare_input(pipeline, prompt, completion, chat, rows, max_new_tokens)
            if note is not None and not quiet:
                echo(f"note: {note}", err=True)
            settings |= sampling if budget is None else sampling | {"budget": _parse_budget(budget)}
            result = pipeline(asked, dataset=rows, verify_dataset=verify, top_k=top_k, **settings)
        _show(result, as_json, lambda: attribution_table(prompt, result, text_column))


@app.command()
def evaluate(
    script: Annotated[Path, typer.Argument(help="Python file with make_trainer(seed) and queries.")],
    model: Annotated[str, typer.Argument(help="Folder of the fine-tuned model with its bank.")],
    halves: Annotated[int, typer.Option(help="Random halves of the rows, for the linear datamodeling score.")] = 32,
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 2,
    rows: Annotated[int, typer.Option(help="Rows left out one at a time, in the same order.")] = 0,
    sources: Annotated[int, typer.Option(help="Sources left out one at a time, in the same order.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of make_trainer in the model's own run.")] = 0,
    folder: Annotated[Path, typer.Option(help="Folder of the outcomes; a killed run resumes from it.")] = Path(
        "fwdattr-retrained"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Retrain without rows, compare with the bank's scores, and write the result into bank.json and the card."""
    with _plain_errors(verbose):
        from . import commands
        from .tables import quality_table

        plan = commands.RetrainingPlan(halves, seeds, rows, sources, seed, folder)
        with commands.quiet_libraries(verbose), _only_json(as_json):
            measured = commands.evaluate(script, model, plan, quiet or as_json)
        _show(measured, as_json, lambda: quality_table(measured))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model with a bank, or of the bank itself.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    repo_type: RepoType = "model",
    subfolder: Subfolder = "fwdattr",
    as_json: Json = False,
) -> None:
    """Verify a bank and show its contents; of one on the Hub only the manifest and headers are read."""
    with _plain_errors():
        from ..bank.inspection import inspect_bank
        from .tables import bank_table

        bank = inspect_bank(model, revision=revision, repo_type=repo_type, subfolder=subfolder)
        checks = "verified"
        if bank.remote is not None:
            checks = f"{bank.remote}: sizes, hashes and headers agree, values not read"
        _show(json.loads(bank.manifest.to_json()), as_json, lambda: bank_table(bank.manifest, checks))


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="Folder of a model with a bank, or of the bank itself.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub; made if it does not exist.")],
    repo_type: RepoType = "model",
    pointer_in: Annotated[
        str | None, typer.Option(help="Model repository whose bank.json shall point to the bank in REPO.")
    ] = None,
    subfolder: Subfolder = "fwdattr",
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    private: Annotated[bool | None, typer.Option(help="Make a new repository private.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of pushing.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Response bank",
) -> None:
    """Put a bank beside its model on the Hub, with a section in the card."""
    with _plain_errors():
        from ..bank.bank import ResponseBank

        address = ResponseBank.from_pretrained(model, subfolder=subfolder).push_to_hub(
            repo, repo_type=repo_type, pointer_in=pointer_in, subfolder=subfolder, revision=revision, private=private,
            create_pr=create_pr, commit_message=message,
        )  # fmt: skip
        echo(f"pushed: {address}")
