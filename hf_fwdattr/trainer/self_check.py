"""Self-check: does leaving something out for real do what the bank says?

The fine-tune is run again from the weights that it started with, in the same order of batches, once as it was and once
without each of a few sources (or groups of rows). The changes of some training rows' losses are compared with what the
bank predicts. Each costs one more training, so nothing is left out unless `ResponseConfig.self_check` asks for it.
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
from ..evaluation.agreement import agreement
from ..gradients.per_sample import PerSampleGradients
from ..models.likelihood import resolve_objective, row_losses
from ..models.modes import frozen
from ..response.dataset import TrainingRows
from .reweighting import apply_row_weights


logger = logging.getLogger(__name__)
_QUERIES = 32  # training rows whose losses are looked at; half of them rows that are left out
_PARTS = 12  # into which rows are dealt where there are no sources


class SelfCheck:
    """Made before the first step; [`run`] after the bank is there.

    Args:
        model (`nn.Module`): as it starts; its trainable weights are copied.
        trainer (`Trainer`): whose run is to be repeated.

    Raises:
        UnsupportedError: there is no trainer that could run again.
    """

    def __init__(self, model: nn.Module, trainer: Trainer | None):
        if trainer is None:
            raise UnsupportedError("self_check runs the fine-tune again, and no Trainer was found; set self_check=0")
        self.trainer = trainer
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def __call__(self, *run: Any) -> None:
        """[`run`], whose failure is only logged: model and bank are there."""
        try:
            logger.info("self-check: %s", self.run(*run))
        except Exception as error:
            logger.error(
                "the bank is made, but its self-check failed: %s", error,
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
            model (`nn.Module`): trained; it has the same weights again afterwards.
            dataset, collate: the training set and its collator.
            order (`list[Tensor]`): rows of each optimizer step.
        """
        began = time.time()
        rows = TrainingRows(dataset, collate, config.batch_size, next(model.parameters()).device)
        owner = torch.cat([sources for _, sources, _ in bank.coordinates()]).long()
        named = bool((owner >= 0).any())
        groups, sources = chosen(owner, config.self_check, config.seed)
        asked = _asked(groups, config.seed)
        end = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.start}
        said = predicted(bank, model, rows, asked, groups, sources if named else None, config)
        try:
            weights = torch.cat([torch.ones(1, len(rows)), 1.0 - groups.float()])
            losses, gap = [], 0.0
            for line in weights:
                self._again(model, rows, order, line, config)
                losses.append(_losses(model, rows, asked, config))
                if len(losses) == 1:
                    gap = _distance(model, end) / max(_distance_of(self.start, end), 1e-30)
        finally:
            _write(model, end)
        outcomes = torch.stack(losses)
        result = agreement(said, (outcomes[1:] - outcomes[0]).T, config.seed)
        figures = {
            "left_out": len(groups), "of": "sources" if named else "twelfths of the rows",
            "spearman": round(result.spearman.mean, 3), "pearson": round(result.pearson, 3),
            "slope": round(result.slope, 3), "replay_gap": round(gap, 4), "seconds": round(time.time() - began, 1),
        }  # fmt: skip
        add_quality(bank.folder, {"self_check": figures})
        return figures

    def _again(
        self, model: nn.Module, rows: TrainingRows, order: list[Tensor], weights: Tensor, config: ResponseConfig
    ) -> None:
        """The fine-tune once more, in the same order, with these weights."""
        _write(model, self.start)
        with tempfile.TemporaryDirectory() as folder, _same_chance():
            trainer = Trainer(
                model=model,
                args=_quiet_arguments(self.trainer.args, folder),
                train_dataset=rows.dataset,
                data_collator=rows.collate,
            )
            trainer.remove_callback(PrinterCallback)
            apply_row_weights(trainer, weights, config.objective)
            sampler = _Recorded(torch.cat(order), len(rows), trainer.args)
            trainer._get_train_sampler = lambda *_: sampler
            trainer.create_optimizer()
            _same_optimizer(trainer.optimizer, self.trainer.optimizer)
            trainer.train()


def chosen(owner: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(groups, rows) booleans and (groups,) numbers: random sources, or random twelfths of rows without sources."""
    generator = torch.Generator().manual_seed(seed)
    if not bool((owner >= 0).any()):
        owner = torch.randperm(len(owner), generator=generator) % _PARTS
    names = owner[owner >= 0].unique()
    names = names[torch.randperm(len(names), generator=generator)[:count]].sort().values
    return torch.stack([owner == name for name in names]), names


def predicted(
    bank: ResponseBank,
    model: nn.Module,
    rows: TrainingRows,
    asked: Tensor,
    groups: Tensor,
    sources: Tensor | None,
    config: ResponseConfig,
) -> Tensor:
    """(queries, groups): nats by which the loss of each row in `asked` should rise without each group.

    As the bank has it: by the sources' own directions where there are any, else by the coordinates of their rows.
    """
    k, manifest = bank.manifest.directions, bank.manifest
    if sources is not None and manifest.source_directions:
        scales = torch.tensor(manifest.source_scales, dtype=torch.float64)
        responses = (bank.directions(torch.float64, slice(k, None)) * scales[:, None])[sources]
    else:
        coordinates = torch.cat([block.double() for _, _, block in bank.coordinates()])
        responses = (groups.double() @ coordinates) @ bank.directions(torch.float64, slice(k))
    responding = bank.check_model(model)
    with frozen(model), bank.query_weights(model, responding):
        gradients = PerSampleGradients(model, responding, resolve_objective(model, config.objective))
        found = torch.cat([gradients(batch)[0].double().cpu() for _, batch in rows.batches(asked.tolist())])
    return -found @ responses.T


class _Recorded(Sampler[int]):
    """The rows of a recorded run, epoch by epoch."""

    def __init__(self, order: Tensor, total: int, args: Any):
        self.order, self.total, self.at = order.tolist(), total, 0
        if args.dataloader_drop_last:
            self.total -= total % args.train_batch_size

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        start, self.at = self.at, self.at + self.total
        return iter(self.order[start : self.at])


def _asked(groups: Tensor, seed: int) -> Tensor:
    """Rows to be asked about: half of them left out with some group, the others not."""
    generator = torch.Generator().manual_seed(seed + 1)
    gone = groups.any(0)
    parts = []
    for some in (gone, ~gone):
        places = some.nonzero().flatten()
        parts.append(places[torch.randperm(len(places), generator=generator)[: _QUERIES // 2]])
    return torch.cat(parts).sort().values


@torch.no_grad()
def _losses(model: nn.Module, rows: TrainingRows, asked: Tensor, config: ResponseConfig) -> Tensor:
    objective = resolve_objective(model, config.objective)
    with frozen(model):
        found = (objective.forward(model, batch) for _, batch in rows.batches(asked.tolist()))
        return torch.cat([row_losses(logits.double(), labels).cpu() for logits, labels in found])


def _quiet_arguments(args: Any, folder: str) -> Any:
    """The run's own arguments, without anything that is saved, evaluated, logged or pushed."""
    args = copy.copy(args)
    args.output_dir, args.report_to, args.disable_tqdm, args.push_to_hub = folder, [], True, False
    args.save_strategy, args.eval_strategy, args.logging_strategy = (
        SaveStrategy.NO,
        IntervalStrategy.NO,
        IntervalStrategy.NO,
    )
    args.load_best_model_at_end, args.do_eval = False, False
    return args


def _same_optimizer(own: Any, other: Any) -> None:
    """Refuse to repeat a run with an optimizer that the arguments alone do not make."""
    other = getattr(other, "optimizer", other)  # accelerate's wrapper
    if type(own) is not type(other) or own.defaults != other.defaults:
        raise UnsupportedError(
            f"self_check runs the fine-tune again with {type(own).__name__} from the training arguments, but it was "
            f"trained with another {type(other).__name__}; give the optimizer by TrainingArguments(optim=...)"
        )


@contextmanager
def _same_chance() -> Iterator[None]:
    """Random numbers of everybody else go on as if nothing had been trained here."""
    kept = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(kept[0])
    numpy.random.set_state(kept[1])


@torch.no_grad()
def _write(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


def _distance(model: nn.Module, weights: dict[str, Tensor]) -> float:
    return _distance_of({name: model.get_parameter(name).detach() for name in weights}, weights)


def _distance_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5
