"""Names of worlds, methods and protocols.

Worlds and methods register themselves by a decorator when their package is imported. A protocol is a function `run` of
a module in `benchmarks.protocols`, whose parameters are its options on the command line; a function `run_more` of the
module `name` is the protocol `name_more`.
"""

import argparse
import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin


if TYPE_CHECKING:  # importing them imports transformers, which some measurements must do last
    from .world import Method, World


__all__ = ["add_options", "load_world", "make_method", "method", "method_names", "protocols", "world", "world_names"]

_WORLDS: dict[str, "Callable[..., World]"] = {}
_METHODS: dict[str, "Callable[..., Method]"] = {}
_FOLDER = Path(__file__).parent
_OPTIONS = json.loads((_FOLDER / "options.json").read_text(encoding="utf-8"))  # help texts


def world(name: str, **fixed: Any) -> Callable[[Any], Any]:
    """Register a class under a name, with values of some of its options."""

    def register(kind: Any) -> Any:
        def make(**options: Any) -> Any:
            made = kind(**(fixed | options))
            made.name = name
            return made

        make.__doc__ = kind.__doc__
        _WORLDS[name] = make
        return kind

    return register


def method(name: str) -> Callable[[Any], Any]:
    """Register a method's class under a name."""

    def register(kind: Any) -> Any:
        _METHODS[name] = kind
        return kind

    return register


@cache
def load_world(name: str, **options: Any) -> "World":
    """Return a world by its name, once in a process."""
    return _named(_WORLDS, name, "worlds")(**options)


def make_method(name: str, **settings: Any) -> "Method":
    """Return a method by its name, with its settings."""
    return _named(_METHODS, name, "methods")(**settings)


def world_names() -> dict[str, str]:
    """Return every world with its first line."""
    return _listed(_WORLDS, "worlds")


def method_names() -> dict[str, str]:
    """Return every method with its first line."""
    return _listed(_METHODS, "methods")


def protocols() -> dict[str, tuple[str, str, str]]:
    """Return module, function and first line of every protocol, without importing it."""
    found = {}
    for path in sorted((_FOLDER / "protocols").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and re.match(r"run(_|$)", node.name):
                name = path.stem + node.name.removeprefix("run")
                text = ast.get_docstring(tree if node.name == "run" else node)
                found[name] = (path.stem, node.name, _first_line(text))
    return found


def add_options(parser: argparse.ArgumentParser, run: Callable[..., Any]) -> None:
    """Give a parser one option for each parameter of a function."""
    for name, parameter in inspect.signature(run).parameters.items():
        flag, kind = "--" + name.replace("_", "-"), parameter.annotation
        if isinstance(kind, UnionType):  # `int | None`
            kind = next(part for part in get_args(kind) if part is not type(None))
        options: dict[str, Any] = {"default": parameter.default, "help": _OPTIONS.get(name)}
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=options["help"])
        elif get_origin(kind) is tuple:
            parser.add_argument(flag, nargs="+", type=get_args(kind)[0], **options)
        else:
            parser.add_argument(flag, type=kind, **options)


def _import_all(package: str) -> None:
    for module in pkgutil.iter_modules([str(_FOLDER / package)]):
        importlib.import_module(f"benchmarks.{package}.{module.name}")


def _named(table: dict[str, Any], name: str, package: str) -> Any:
    _import_all(package)
    if name not in table:
        raise SystemExit(f"{name}: not one of the {package}. There are {', '.join(sorted(table))}")
    return table[name]


def _listed(table: dict[str, Any], package: str) -> dict[str, str]:
    _import_all(package)
    return {name: _first_line(made.__doc__) for name, made in sorted(table.items())}


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
