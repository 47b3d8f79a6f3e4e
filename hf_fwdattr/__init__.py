"""Which training rows made a model say this? Answered inside the Hugging Face stack, with forward passes only."""

from .bank.bank import ResponseBank
from .config import ResponseConfig
from .pipeline import TrainingDataAttributionPipeline
from .trainer.build import build_bank
from .trainer.callback import ResponseCallback
from .trainer.recorder import ResponseRecorder


__version__ = "0.1.0"
__all__ = [
    "ResponseBank",
    "ResponseCallback",
    "ResponseConfig",
    "ResponseRecorder",
    "TrainingDataAttributionPipeline",
    "build_bank",
]
