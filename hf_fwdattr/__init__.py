"""Training data attribution for Hugging Face models: which training rows made a model say this?

Public names are imported on first use, so `import hf_fwdattr` loads neither torch nor transformers. The task
"training-data-attribution" is known to `transformers.pipeline` once both packages are imported, in either order.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

import wrapt

from .errors import AttributionError, BankError, MismatchError, NumericalError, QueryError, UnsupportedError


if TYPE_CHECKING:
    from .bank.bank import ResponseBank
    from .config import ResponseConfig
    from .pipeline import TrainingDataAttributionPipeline
    from .query.batch import batch_scores
    from .query.loading import AutoModelForAttribution
    from .query.results import AttributionResult, RowScore, SourceScore
    from .query.scorer import Scorer
    from .trainer.build import build_bank
    from .trainer.callback import ResponseCallback
    from .trainer.recorder import ResponseRecorder

    __version__: str

__all__ = [
    "AttributionError",
    "AttributionResult",
    "AutoModelForAttribution",
    "BankError",
    "MismatchError",
    "NumericalError",
    "QueryError",
    "ResponseBank",
    "ResponseCallback",
    "ResponseConfig",
    "ResponseRecorder",
    "RowScore",
    "Scorer",
    "SourceScore",
    "TrainingDataAttributionPipeline",
    "UnsupportedError",
    "batch_scores",
    "build_bank",
]

_MODULES = {
    "AttributionResult": "query.results",
    "AutoModelForAttribution": "query.loading",
    "ResponseBank": "bank.bank",
    "ResponseCallback": "trainer.callback",
    "ResponseConfig": "config",
    "ResponseRecorder": "trainer.recorder",
    "RowScore": "query.results",
    "Scorer": "query.scorer",
    "SourceScore": "query.results",
    "TrainingDataAttributionPipeline": "pipeline",
    "batch_scores": "query.batch",
    "build_bank": "trainer.build",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or read the installed version."""
    if name == "__version__":
        return metadata.version("hf-fwdattr")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


@wrapt.when_imported("transformers.pipelines")
def _register_task(_: Any) -> None:
    """Import the pipeline, which registers its task: at once, or as soon as transformers' pipelines are imported."""
    import_module(".pipeline", __name__)
