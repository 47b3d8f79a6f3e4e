"""First use in a fresh interpreter: light imports, the task in either order, missing extras in one sentence."""

import sys

import pytest

import hf_fwdattr
from tests.helpers.interpreter import COMMAND, LOADED, fresh


@pytest.mark.parametrize("name", hf_fwdattr.__all__)
def test_public_names_are_found(name: str) -> None:
    assert getattr(hf_fwdattr, name).__name__ == name
    assert name in dir(hf_fwdattr)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bank'"):
        _ = hf_fwdattr.Bank


def test_import_is_light_and_knows_the_version() -> None:
    result = fresh("import sys, hf_fwdattr; print(hf_fwdattr.__version__); " + LOADED)
    assert result.stdout == f"{hf_fwdattr.__version__}\n[]\n", result.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["--help"], ["build", "--help"]], ids=" ".join)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    result = fresh(COMMAND, arguments)
    assert result.returncode == 0, result.stderr
    assert ("hf-fwdattr" in result.stdout) or ("Usage" in result.stdout)
    assert result.stdout.endswith("[]\n")


def test_progress_bars_leave_few_lines_in_a_log() -> None:
    loop = "import time\nfrom tqdm import tqdm\nfor _ in tqdm(range(400)):\n    time.sleep(0.002)"
    result = fresh(f"from hf_fwdattr.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n{loop}", ["-h"])
    assert 1 <= result.stderr.count("it/s]") <= 2, result.stderr


IMPORTS = ["import hf_fwdattr", "from transformers import pipeline"]


@pytest.mark.parametrize("imports", [IMPORTS, IMPORTS[::-1]], ids=["package first", "transformers first"])
def test_the_task_is_known_in_either_order(imports: list[str]) -> None:
    check = "from transformers.pipelines import PIPELINE_REGISTRY as registry"
    task = "print(registry.check_task('training-data-attribution')[1]['impl'].__name__)"
    result = fresh("; ".join([*imports, check, task]))
    assert result.stdout == "TrainingDataAttributionPipeline\n", result.stderr


@pytest.mark.parametrize(
    ("library", "arguments", "extra"),
    [
        ("typer", ["--help"], "cli"),
        ("rich", ["inspect", "nowhere"], "cli"),
        ("bm25s", ["demo"], "demo"),
        ("jinja2", ["demo"], "demo"),
    ],
)
def test_a_missing_extra_is_named_in_one_sentence(library: str, arguments: list[str], extra: str) -> None:
    result = fresh(f"import sys; sys.modules[{library!r}] = None; from hf_fwdattr.cli import main; main()", arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{library} is not installed. Run: pip install 'hf-fwdattr[{extra}]'" in result.stderr


def test_evaluation_without_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fwdattr.evaluation.agreement import scipy_stats

    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy is not installed\. Run: pip install 'hf-fwdattr\[eval\]'"):
        scipy_stats()
