"""The architecture: imports point one way, few doors to other libraries, no module too large, one word per concept."""

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_fwdattr"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What each room may import of the others, from the ground up. `evaluation` judges any method, so it knows none.
GROUND = {"errors", "models"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "models": {"errors"},
    "layers": GROUND,
    "gradients": GROUND | {"layers"},
    "jvp": GROUND | {"layers"},
    "bank": GROUND,
    "response": GROUND | {"gradients", "bank"},
    "query": GROUND | {"bank", "gradients", "jvp"},
    "evaluation": set(),
    "trainer": GROUND | {"config", "bank", "evaluation", "gradients", "query", "response"},
    "pipeline": GROUND | {"bank", "jvp", "query"},
    "demo": GROUND | {"config", "bank", "evaluation", "pipeline", "query", "trainer"},
    "cli": GROUND | {"config", "bank", "demo", "evaluation", "pipeline", "query", "trainer"},
}
OUTER = {"trainer", "query", "pipeline", "demo", "cli"}
# Libraries that only some rooms may know.
DOORS: dict[str, set[str]] = {
    "transformers": OUTER,
    "accelerate": OUTER,
    "peft": OUTER,
    "datasets": OUTER,
    "safetensors": {"bank"},
    "huggingface_hub": {"bank"},
    "pydantic": {"bank", "config"},
    "httpx2": {"bank"},
    "yaml": {"bank"},
    "typer": {"cli"},
    "rich": {"cli", "demo"},
    "jinja2": {"demo"},
    "bm25s": {"demo"},
    "scipy": {"evaluation"},
}


def room(module: str) -> str:
    """`hf_fwdattr.response.low_rank` -> `response`; the package itself, which only re-exports, has none."""
    return [*module.split("."), ""][1]


def imported(module: str) -> Iterator[str]:
    """Full names of everything that a module imports, anywhere in it; of this package's, the modules."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def test_the_reader_of_imports_reads() -> None:
    found = set(imported("hf_fwdattr.response.segment"))
    assert {"hf_fwdattr.response.curvature", "hf_fwdattr.response.horizon", "torch", "dataclasses"} <= found


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_imports_point_one_way(module: str) -> None:
    own = room(module)
    assert own in ALLOWED, f"{module} is in no room of the drawing"
    for name in imported(module):
        if name.split(".")[0] == "hf_fwdattr":
            other = room(name)
            assert other, f"{module} imports the whole package: import the room"
            assert other == own or other in ALLOWED[own], f"{own} must not import {other} ({module} imports {name})"


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_libraries_come_in_by_their_doors(module: str) -> None:
    for name in imported(module):
        top = name.split(".")[0]
        assert room(module) in DOORS.get(top, {room(module)}), f"{module} must not import {top}"


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "response"])
def test_the_mathematics_needs_torch_alone(module: str) -> None:
    libraries = {name.split(".")[0] for name in imported(module)} - sys.stdlib_module_names
    assert libraries <= {"hf_fwdattr", "torch", "numpy", "tqdm"}


def test_no_import_runs_in_a_circle() -> None:
    graph = {module: {name for name in imported(module) if name in MODULES} - {module} for module in MODULES}
    while True:
        leaves = {module for module, needs in graph.items() if not needs}
        if not leaves:
            break
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert not graph, f"a circle runs through {sorted(graph)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_a_drawer_for_everything(module: str) -> None:
    assert not re.search(r"util|helper|misc|common", module.rpartition(".")[2])
    assert len(MODULES[module].read_text().splitlines()) <= 350, "over 350 lines: find the second noun in it"


def bodies(module: str) -> Iterator[tuple[str, int]]:
    """Name and length in lines of each function's body, docstring and signature aside."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_long(module: str) -> None:
    assert [(name, lines) for name, lines in bodies(module) if lines > 50] == []


# One word per concept: these had other names while the package was young. `readout` is an option's name only.
RETIRED = {
    "probe", "probes", "dual", "duals", "kriging", "responding", "exposure", "anatomy", "covectors", "bracket",
    "handful", "strangers", "stretches", "announce", "told", "weigh", "retreat", "sharpened", "disguises",
    "quantised", "unpacked", "mixtures", "readouts", "places",
}  # fmt: skip


def words(name: str) -> set[str]:
    """`_probe_shards` and `ProbeShards` -> probe, shards."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that a module defines or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


@pytest.mark.parametrize("module", MODULES)
def test_identifiers_use_the_current_words(module: str) -> None:
    found = {name for name in identifiers(ast.parse(MODULES[module].read_text())) if words(name) & RETIRED}
    assert found == set()


# How a docstring must not begin: these openings made riddles.
RIDDLES = re.compile(r"^(Of|What|Whether|Where|Who|How) |\b(somebody|nobody|whoever|has it not)\b", re.IGNORECASE)


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_begin_with_a_noun_or_an_imperative(module: str) -> None:
    tree, riddles = ast.parse(MODULES[module].read_text()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = (ast.get_docstring(node) or "").split("\n")[0]
            if RIDDLES.search(first):
                riddles.append(first)
    assert riddles == []


@pytest.mark.parametrize("module", [name for name in MODULES if not MODULES[name].name.startswith("__")])
def test_modules_say_what_they_export(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assigned = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
                if isinstance(target, ast.Name)}  # fmt: skip
    assert "__all__" in assigned


def test_parameter_lists_are_short() -> None:
    """Dataclasses and the options of commands aside, no function takes more than ten parameters."""
    long = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                if count > 10:
                    long.append(f"{module}.{node.name}: {count}")
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_repository_names_no_machine() -> None:
    """No file says where it was written; paths like these work on one computer only."""
    machine = re.compile(rb"(?<![\w.])/(?:work|root|tmp/w|opt/pypi|home/\w+)/")
    named = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".ci" or not re.match(r"\.|__pycache__|build|dist", name)]
        paths = (Path(folder) / name for name in files)
        named += [path for path in paths if path != Path(__file__) and machine.search(path.read_bytes())]
    assert named == []
