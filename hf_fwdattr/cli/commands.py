"""The work of the commands: build a bank, open the pipeline, evaluate by retraining, silence other libraries."""

import hashlib
import json
import runpy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, pipeline, set_seed
from transformers.utils import logging as transformers_logging

from ..bank.bank import ResponseBank
from ..bank.quality import add_quality
from ..config import ResponseConfig
from ..errors import QueryError
from ..evaluation.agreement import loo
from ..evaluation.designs import random_halves, random_rows, without_rows, without_sources
from ..evaluation.metrics import lds, noise_ceiling
from ..evaluation.retrain import retrain
from ..models import positions
from ..pipeline import TASK, AutoModelForAttribution, TrainingDataAttributionPipeline
from ..trainer.build import build_bank
from ..trainer.reweighting import RetrainFunction, query_losses
from .datasets import DatasetSource


__all__ = [
    "ModelSource", "RetrainingPlan", "build", "context_length", "evaluate", "open_pipeline", "quiet_libraries",
    "read_settings", "sampling",
]  # fmt: skip


@contextmanager
def quiet_libraries(verbose: bool = False) -> Iterator[None]:
    """Silence progress bars and notices of other libraries, unless `verbose`; restored afterwards."""
    if verbose:
        yield
        return
    verbosity, model_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    dataset_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(datasets|peft|torch|transformers)\b")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if model_bars:
            transformers_logging.enable_progress_bar()
        if dataset_bars:
            enable_progress_bars()


@dataclass(frozen=True)
class ModelSource:
    """A model or adapter by folder or Hub id, and the branch, tag or commit of one on the Hub."""

    name: str
    revision: str | None = None

    def load(self) -> tuple[Any, Any]:
        """Load the model and its tokenizer; an adapter without tokenizer files has its base model's.

        Raises:
            QueryError: a folder that does not exist, or without a model in it.
        """
        self._check()
        model = AutoModelForAttribution.from_pretrained(self.name, revision=self.revision or "main")
        tokenizer = getattr(model, "attribution_tokenizer", None)
        if tokenizer is None:
            tokenizer = _open_tokenizer(model.name_or_path, getattr(model.config, "_commit_hash", None))
        return model, _with_padding(tokenizer)

    def _check(self) -> None:
        folder = Path(self.name)
        if not self.name.strip():
            raise QueryError("MODEL: an empty name. Name the model's folder or its Hub id")
        if not folder.is_dir():
            if folder.is_absolute() or self.name.count("/") > 1 or self.name.startswith((".", "~")):
                raise QueryError(f"{self.name}: there is no such folder. Name the model's folder or its Hub id")
            return
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            if self.revision is not None:
                raise QueryError(
                    f"--revision: {self.revision}. {self.name} is a folder on this machine, which has no revisions. "
                    "Leave the option out, or name the model on the Hub"
                )
            return
        found = "holds neither config.json nor adapter_config.json, so no model"
        if any((folder / name).is_file() for name in ("bank.json", "fwdattr/bank.json")):
            found = f"holds a bank and no model. Name the model, and the bank by --bank {self.name}"
        inside = sorted(path.parent.name for path in folder.glob("*/*config.json"))
        hint = f". Its folder {inside[0]} holds one" if inside else ""
        raise QueryError(f"{self.name}: the folder {found}{hint}. trainer.save_model() writes the model")


def _open_tokenizer(name: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise QueryError(
            f"{name}: its tokenizer cannot be loaded ({str(error).strip().splitlines()[0]}). Save the tokenizer "
            "beside the model: tokenizer.save_pretrained(...)"
        ) from error


def _with_padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(model: Any) -> int | None:
    """Return the length of the texts that a model was made for, in tokens, if its configuration says it."""
    config = model.config.get_text_config()
    lengths = [getattr(config, "max_position_embeddings", None), positions.context_length(model)]
    return min((length for length in lengths if length is not None), default=None)


def read_settings(path: Path) -> Any:
    """Read a JSON file of settings, in UTF-8 with or without a byte order mark.

    Raises:
        QueryError: the file cannot be read, or is no JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QueryError(f"--config: {path}. It cannot be read ({error.strerror}). Name a JSON file") from error
    except ValueError as error:
        raise QueryError(f"--config: {path}. It is not sound JSON in UTF-8 ({error})") from error
    if not isinstance(settings, dict):
        raise QueryError(f'--config: {path}. It holds no JSON object. Write {{"directions": 128}}')
    return settings


def sampling(do_sample: bool | None, temperature: float | None, seed: int | None, given: bool) -> dict[str, Any]:
    """Return the settings of sampling, and set the seed.

    Args:
        given (`bool`): the output is given, so that nothing is sampled.

    Raises:
        QueryError: a setting without effect, or a temperature that is not positive.
    """
    chosen = {"--do-sample": do_sample, "--temperature": temperature, "--seed": seed}
    for name, value in chosen.items():
        if given and value is not None:
            raise QueryError(f"{name}: {value}. The output is given by --completion, so none is sampled. Leave it out")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise QueryError(f"--temperature: {temperature}. It must be above 0. For no sampling say --no-do-sample")
    if temperature is not None and not do_sample:
        raise QueryError(f"--temperature: {temperature}. It is for sampling alone. Add --do-sample")
    if seed is not None:
        if not 0 <= seed < 2**32:
            raise QueryError(f"--seed: {seed}. It must be from 0 to 4294967295")
        set_seed(seed)
    settings = {"do_sample": do_sample, "temperature": temperature}
    return {name: value for name, value in settings.items() if value is not None}


def open_pipeline(model: ModelSource, bank: str | None = None, **settings: Any) -> TrainingDataAttributionPipeline:
    """Open the attribution pipeline of a model or adapter with its tokenizer and bank."""
    if bank is not None:
        settings["bank"] = ResponseBank.from_pretrained(bank)
    loaded, tokenizer = model.load()
    return pipeline(TASK, model=loaded, tokenizer=tokenizer, **settings)


def build(
    model: ModelSource, source: DatasetSource, config: ResponseConfig, record: Path | None, output: Path | None
) -> Path:
    """Build the bank of a fine-tuned model, and return its folder.

    Raises:
        QueryError: `output` is not given, and the model is not a local folder.
    """
    if output is None and not Path(model.name).is_dir():
        raise QueryError(f"{model.name} is no local folder to put the bank into; say --output")
    loaded, tokenizer = model.load()
    rows = source.tokenized(tokenizer, context_length(loaded))
    if "labels" in rows.column_names:  # the other collator would make labels of all tokens, masked ones too
        collate = DataCollatorForSeq2Seq(tokenizer)
    else:
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    folder = (output or Path(model.name)) / config.folder
    build_bank(loaded, rows, config, data_collator=collate, processing_class=tokenizer, record=record, folder=folder)
    return folder


@dataclass(frozen=True)
class RetrainingPlan:
    """Retrainings that a bank is compared with.

    Attributes:
        halves, seeds (`int`): random halves of the rows for the linear datamodeling score, and retrainings of each.
        rows, sources (`int`): rows and sources to leave out one at a time, in the order of the run with `seed`.
        folder (`Path`): keeps the outcomes, so that a killed run resumes.
    """

    halves: int
    seeds: int
    rows: int
    sources: int
    seed: int
    folder: Path


def evaluate(script: Path, model: str, plan: RetrainingPlan, quiet: bool = False) -> dict[str, Any]:
    """Retrain by a script, compare with the bank, write `quality` into the bank and its card, and return it.

    Args:
        script (`Path`): a Python file with `make_trainer(seed)`, a fresh Trainer with all rows, and `queries`, token
            lists with `input_ids` and `labels`; `objective` is optional.
        model (`str`): folder of the fine-tuned model with its bank.
    """
    names = _run_script(script)
    queries = [dict(query) for query in names["queries"]]
    attribute = open_pipeline(ModelSource(model))
    train = RetrainFunction(names["make_trainer"], queries, names.get("objective", "auto"))
    content = script.read_bytes() + json.dumps(queries, sort_keys=True).encode()
    settings = {"folder": plan.folder, "quiet": quiet, "name": hashlib.sha256(content).hexdigest()}
    measured: dict[str, Any] = {}
    if plan.halves:
        measured["LDS"] = _halves(attribute, train, plan, settings)
    if plan.rows:
        measured["leave_one_out"] = _rows(attribute, train, plan, settings)
    if plan.sources:
        measured["sources_left_out"] = _sources(attribute, train, plan, settings)
    add_quality(attribute.bank.folder, measured)
    return measured


def _run_script(script: Path) -> dict[str, Any]:
    if not script.is_file():
        raise QueryError(f"there is no script {script}")
    names = runpy.run_path(str(script))
    for name in ("make_trainer", "queries"):
        if name not in names:
            raise QueryError(
                f"{script} does not define {name!r}: it needs make_trainer(seed), which returns a fresh Trainer with "
                "all rows, and queries, a list of {'input_ids': ..., 'labels': ...}"
            )
    return names


def _halves(
    attribute: TrainingDataAttributionPipeline, train: RetrainFunction, plan: RetrainingPlan, settings: dict[str, Any]
) -> dict[str, Any]:
    scores, kept = attribute.scores(train.queries), random_halves(len(attribute.bank), plan.halves)
    outcomes = retrain(train, kept, range(1, plan.seeds + 1), description="halves", **settings)
    score = lds(scores, kept, outcomes.mean(0))
    measured = {
        "mean": round(score.mean, 3), "low": round(score.low, 3), "high": round(score.high, 3), "halves": plan.halves,
        "seeds": plan.seeds, "queries": len(train.queries),
    }  # fmt: skip
    if plan.seeds > 1:
        measured["one_retraining"] = round(noise_ceiling(outcomes).mean, 3)
    return measured


def _rows(
    attribute: TrainingDataAttributionPipeline, train: RetrainFunction, plan: RetrainingPlan, settings: dict[str, Any]
) -> dict[str, Any]:
    total = len(attribute.bank)
    left_out = random_rows(total, plan.rows)
    outcomes = retrain(train, without_rows(total, left_out), [plan.seed], description="rows", **settings)[0]
    result = loo(attribute.scores(train.queries), left_out, outcomes)
    return {"rows": len(left_out)} | result.summary() | _replay_gap(attribute, train, outcomes)


def _sources(
    attribute: TrainingDataAttributionPipeline, train: RetrainFunction, plan: RetrainingPlan, settings: dict[str, Any]
) -> dict[str, Any]:
    bank = attribute.bank
    if not bank.manifest.sources:
        raise QueryError("the bank knows no sources to leave out; make it with ResponseConfig(source_column=...)")
    row_sources = torch.cat([sources for _, sources, _ in bank.coordinates()]).long()
    left_out = random_rows(len(bank.manifest.sources), plan.sources)
    weights = without_sources(row_sources, left_out)
    outcomes = retrain(train, weights, [plan.seed], description="sources", **settings)[0]
    result = loo(attribute.source_scores(train.queries), left_out, outcomes)
    return {"sources": len(left_out)} | result.summary() | _replay_gap(attribute, train, outcomes)


def _replay_gap(
    attribute: TrainingDataAttributionPipeline, train: RetrainFunction, outcomes: Tensor
) -> dict[str, Any]:
    """Compare the run with all rows with the bank's own model: the gap is large if seed or script differ."""
    losses = query_losses(attribute.model, train.queries, train.objective)
    return {"replay_gap_nats": round(float((outcomes[0] - losses).abs().max()), 4)}
