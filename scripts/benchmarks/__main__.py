"""Run a measurement: `cd scripts && python -m benchmarks NAME [options]`; without a name, list what there is."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import registry
from .report import results


def main(arguments: list[str] | None = None) -> int:
    """Run the protocol that the first argument names."""
    words = sys.argv[1:] if arguments is None else arguments
    sys.path.append(str(Path(__file__).parents[2]))  # some measurements use the helpers of the tests
    names = registry.protocols()
    if not words or words[0] in ("-h", "--help"):
        _list(names)
        return 0
    if words[0] not in names:
        print(f"{words[0]}: no such measurement. There are {', '.join(names)}", file=sys.stderr)
        return 2
    parser, run = parser_of(words[0])
    options = vars(parser.parse_args(words[1:]))
    results.FOLDER = options.pop("results")
    return int(run(**options) or 0)


def parser_of(name: str) -> tuple[argparse.ArgumentParser, Callable[..., Any]]:
    """Return the parser of a protocol's options, and the function that runs it."""
    module_name, function, _ = registry.protocols()[name]
    module = importlib.import_module(f"benchmarks.protocols.{module_name}")
    run = getattr(module, function)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=module.__doc__ if function == "run" else run.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    registry.add_options(parser, run)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the result files")
    return parser, run


def _list(names: dict[str, tuple[str, str, str]]) -> None:
    tables = (
        (
            "measurements, by `python -m benchmarks NAME`; each has --help",
            {name: own[2] for name, own in names.items()},
        ),
        ("worlds, by --world", registry.world_names()),
        ("methods, named by the worlds", registry.method_names()),
    )
    for title, table in tables:
        print(f"{title}\n")
        for name, line in table.items():
            print(f"  {name:20} {line}")
        print()


if __name__ == "__main__":
    sys.exit(main())
