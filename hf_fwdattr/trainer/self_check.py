"""Self-check: leave sources out for real, and compare with what the bank predicts.

The fine-tune is run again from its initial weights, in the same order of batches, once as it was and once without each
of a few sources (or groups of rows). The changes of some training rows' losses are compared with the bank's
predictions. Each costs one more training, so nothing is left out unless `ResponseConfig.self_check` asks for it.
"""

import copy
import logging
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..bank.bank import ResponseBank
from ..bank.quality import add_quality
from ..config import ResponseConfig
from ..errors import AttributionError, UnsupportedError
from ..evaluation.agreement import agreement, scipy_stats
from ..gradients.per_sample import PerSampleGradients
from ..models.interrupts import uninterrupted
from ..models.likelihood import resolve_objective, row_losses
from ..models.modes import frozen
from ..response.dataset import TrainingRows
from .patching import Patches
from .reweighting import apply_row_weights


__all__ = ["SelfCheck", "choose_groups", "predict_changes"]

logger = logging.getLogger(__name__)
_QUERIES = 32  # training rows whose losses are compared; half of them are left out with some group
_PARTS = 12  # groups into which rows without sources are dealt


class SelfCheck:
    """Comparison of a bank with real retraining; made before the first step, [`run`] once the bank is written.

    Args:
        model (`nn.Module`): as training starts; its trainable weights are copied.
        trainer (`Trainer`): the trainer whose run is repeated.

    Raises:
        UnsupportedError: there is no trainer that could run again.
        ModuleNotFoundError: scipy is not installed.
    """

    def __init__(self, model: nn.Module, trainer: Trainer | None):
        if trainer is None:
            raise UnsupportedError(
                "self_check: no Trainer was found that could run the fine-tune again. Call "
                "ResponseCallback(config).add_to(trainer), or set self_check=0"
            )
        scipy_stats()  # refuse before the training what the comparison after it would need
        self.trainer = trainer
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def run_safely(self, *arguments: Any) -> None:
        """Call [`run`] and only log its failure: model and bank are complete."""
        try:
            logger.info("self-check: %s", self.run(*arguments))
        except Exception as error:
            logger.error(
                "the bank is written, but its self-check failed: %s", error,
                exc_info=not isinstance(error, AttributionError | OSError),
            )  # fmt: skip

    def run(
        self,
        bank: ResponseBank,
        model: nn.Module,
        dataset: Any,
        collate: Any,
        order: list[Tensor],
        config: ResponseConfig,
    ) -> dict[str, Any]:
        """Leave out `config.self_check` sources, write the comparison into the bank's `quality`, and return it.

        Args:
            bank (`ResponseBank`): of this run.
            model (`nn.Module`): the trained model; it has the same weights again afterwards.
            dataset, collate: the training set and its collator.
            order (`list[Tensor]`): row indices of each optimizer step.
        """
        began = time.time()
        rows = TrainingRows(dataset, collate, config.batch_size, next(model.parameters()).device)
        source_of_row = torch.cat([sources for _, sources, _ in bank.coordinates()]).long()
        has_sources = bool((source_of_row >= 0).any())
        groups, sources = choose_groups(source_of_row, config.self_check, config.seed)
        query_rows = _choose_queries(groups, config.seed)
        end = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.start}
        predictions = predict_changes(bank, model, rows, query_rows, groups, sources if has_sources else None, config)
        try:
            weights = torch.cat([torch.ones(1, len(rows)), 1.0 - groups.float()])
            losses, replay_gap = [], 0.0
            for row_weights in weights:
                self._retrain(model, rows, order, row_weights, config)
                losses.append(_losses(model, rows, query_rows, config))
                if len(losses) == 1:
                    replayed = {name: model.get_parameter(name).detach() for name in end}
                    replay_gap = _distance(replayed, end) / max(_distance(self.start, end), 1e-30)
        finally:
            with uninterrupted():
                _write(model, end)
        outcomes = torch.stack(losses)
        result = agreement(predictions, (outcomes[1:] - outcomes[0]).T, config.seed)
        figures = {
            "left_out": len(groups), "of": "sources" if has_sources else "twelfths of the rows",
            "spearman": round(result.spearman.mean, 3), "pearson": round(result.pearson, 3),
            "slope": round(result.slope, 3), "replay_gap": round(replay_gap, 4),
            "seconds": round(time.time() - began, 1),
        }  # fmt: skip
        add_quality(bank.folder, {"self_check": figures})
        return figures

    def _retrain(
        self, model: nn.Module, rows: TrainingRows, order: list[Tensor], weights: Tensor, config: ResponseConfig
    ) -> None:
        """Repeat the fine-tune in the same order, with weights (rows,)."""
        _write(model, self.start)
        with tempfile.TemporaryDirectory() as folder, _preserved_random_state():
            trainer = Trainer(
                model=model,
                args=_quiet_arguments(self.trainer.args, folder),
                train_dataset=rows.dataset,
                data_collator=rows.collate,
            )
            trainer.remove_callback(PrinterCallback)
            apply_row_weights(trainer, weights, config.objective)
            sampler = _RecordedOrder(torch.cat(order), len(rows), trainer.args)
            Patches().replace(trainer, _get_train_sampler=lambda *_: sampler)
            trainer.create_optimizer()
            _refuse_other_optimizer(trainer.optimizer, self.trainer.optimizer)
            trainer.train()


def choose_groups(source_of_row: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return Booleans (groups, rows) and numbers (groups,) of random sources, or twelfths of rows without sources."""
    generator = torch.Generator().manual_seed(seed)
    if not bool((source_of_row >= 0).any()):
        source_of_row = torch.randperm(len(source_of_row), generator=generator) % _PARTS
    sources = source_of_row[source_of_row >= 0].unique()
    sources = sources[torch.randperm(len(sources), generator=generator)[:count]].sort().values
    return torch.stack([source_of_row == source for source in sources]), sources


def predict_changes(
    bank: ResponseBank,
    model: nn.Module,
    rows: TrainingRows,
    query_rows: Tensor,
    groups: Tensor,
    sources: Tensor | None,
    config: ResponseConfig,
) -> Tensor:
    """Return (queries, groups): nats by which the loss of each query row should rise without each group.

    Computed from the sources' own directions where the bank has them, else from the coordinates of their rows.
    """
    k, manifest = bank.manifest.directions, bank.manifest
    if sources is not None and manifest.source_directions:
        scales = torch.tensor(manifest.source_scales, dtype=torch.float64)
        responses = (bank.directions(torch.float64, slice(k, None)) * scales[:, None])[sources]
    else:
        coordinates = torch.cat([block.double() for _, _, block in bank.coordinates()])
        responses = (groups.double() @ coordinates) @ bank.directions(torch.float64, slice(k))
    parameters = bank.check_model(model)
    with frozen(model), bank.query_weights(model, parameters):
        per_sample = PerSampleGradients(model, parameters, resolve_objective(model, config.objective))
        gradients = torch.cat([per_sample(batch)[0].double().cpu() for _, batch in rows.batches(query_rows.tolist())])
    return -gradients @ responses.T


class _RecordedOrder(Sampler[int]):
    """Sampler that repeats the rows of a recorded run, epoch by epoch."""

    def __init__(self, order: Tensor, total: int, args: Any):
        self.order, self.total, self.position = order.tolist(), total, 0
        if args.dataloader_drop_last:
            self.total -= total % args.train_batch_size

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        start, self.position = self.position, self.position + self.total
        return iter(self.order[start : self.position])


def _choose_queries(groups: Tensor, seed: int) -> Tensor:
    """Choose rows whose losses are compared: half of them are left out with some group, the others never."""
    generator = torch.Generator().manual_seed(seed + 1)
    left_out = groups.any(0)
    parts = []
    for mask in (left_out, ~left_out):
        row_indices = mask.nonzero().flatten()
        parts.append(row_indices[torch.randperm(len(row_indices), generator=generator)[: _QUERIES // 2]])
    return torch.cat(parts).sort().values


@torch.no_grad()
def _losses(model: nn.Module, rows: TrainingRows, query_rows: Tensor, config: ResponseConfig) -> Tensor:
    objective = resolve_objective(model, config.objective)
    with frozen(model):
        outputs = (objective.forward(model, batch) for _, batch in rows.batches(query_rows.tolist()))
        return torch.cat([row_losses(logits.double(), labels).cpu() for logits, labels in outputs])


def _quiet_arguments(args: Any, folder: str) -> Any:
    """Return a copy of the run's arguments that saves, evaluates, logs and pushes nothing."""
    args = copy.copy(args)
    args.output_dir, args.report_to, args.disable_tqdm, args.push_to_hub = folder, [], True, False
    args.save_strategy = SaveStrategy.NO
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.load_best_model_at_end, args.do_eval = False, False
    return args


def _refuse_other_optimizer(optimizer: Any, original: Any) -> None:
    """Refuse to repeat a run with an optimizer that the arguments alone do not make."""
    original = getattr(original, "optimizer", original)  # accelerate's wrapper
    given = {option: original.defaults.get(option) for option in optimizer.defaults}  # torch adds some on the way
    if type(optimizer) is not type(original) or optimizer.defaults != given:
        raise UnsupportedError(
            f"self_check: the training arguments make a {type(optimizer).__name__} and the fine-tune used another "
            f"{type(original).__name__}, so it cannot be repeated. Give the optimizer by TrainingArguments(optim=...)"
        )


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    """Restore every random state afterwards, as if nothing had been trained."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@torch.no_grad()
def _write(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5
