"""Checks of the loss: its value and its gradient against the likelihood that is attributed, on real batches.

What a training loop does with a loss cannot be read from its code, but it shows in numbers. The loss that a model
returns must be the batch's summed negative log-likelihood over a divisor, the loss that goes backward must be that
times a factor, and nothing else may send a gradient to the logits.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.likelihood import IGNORED, Objective, log_probabilities


__all__ = ["LossCheck", "divisor", "is_checked"]

_CHUNK = 1 << 22  # logits that are widened to float32 at a time
_LARGEST_ROW = 1 << 26  # logits of a row beyond which gradients are not compared
_ROUTER_SHARE = 0.01  # share of the loss up to which a router loss is left out of the responses
_DIVISORS = ("given", "supervised", "labels", "rows", "none")


def is_checked(step: int) -> bool:
    """Return whether the values of a step, counted from 0 in this process, are compared: 0, 10, 100, 1000, ..."""
    return step == 0 or step == 10 ** (len(str(step)) - 1) > 1


def divisor(kind: str | None, given: Any, labels: Tensor | None, shifted: bool) -> Any:
    """Return the divisor of a micro-batch's summed loss; None where it is unknown.

    Args:
        kind (`str`, *optional*): `given` (num_items_in_batch), `supervised` (positions of this micro-batch), `labels`
            (the same, the first of each row included), `rows` or `none`; None before it was measured.
        given: what the model is told.
        labels (`Tensor`, *optional*): what the model is given.
        shifted (`bool`): whether the first label of a row is not supervised.
    """
    if kind == "given" or (kind is None and given is not None):
        return given
    if kind == "none":
        return 1
    if labels is None:
        return None
    if kind == "rows":
        return len(labels)
    counted = labels[:, 1:] if shifted and kind != "labels" and labels.ndim > 1 else labels
    return (counted != IGNORED).sum()


class LossCheck:
    """Comparison of the values of a training loop's losses with the likelihood.

    Args:
        model (`nn.Module`): the model without its wrappers.
        objective (`Objective`): the likelihood.

    Attributes:
        report (`Callable`): is given each mismatch as a sentence; raises it at the first step, notes it later.
        kind (`str`, *optional*): the divisor that the model was measured to use; None while several fit.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        self.model, self.objective, self.shifted = model, objective, objective.shifts_labels
        self.report: Callable[[str], None] = _refuse
        self.kind: str | None = None
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None
        self._batch: Mapping[str, Any] = {}
        self._losses: list[tuple[Any, Tensor]] = []

    @torch.no_grad()
    def value(self, micro: Any, batch: Mapping[str, Any], output: Any) -> None:
        """Compare the loss that the model returned, and measure its divisor if it is not known.

        Args:
            micro (`MicroBatch`): gets the divisor that the model used.
            batch (`dict`): what the model was called with.
            output: what it returned, with `loss` and `logits`.
        """
        loss, labels = output.get("loss"), batch.get("labels")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not isinstance(labels, Tensor):
            return
        aligned = self._aligned(batch, output)
        if aligned is None:
            return
        total, measured = _summed_loss(*aligned), float(loss)
        measured -= self._router_loss(output, measured)
        kinds = {
            kind: float(value) for kind in ([self.kind] if self.kind else _DIVISORS)
            if (value := divisor(kind, batch.get("num_items_in_batch"), labels, self.shifted)) is not None
            and float(value) > 0
        }  # fmt: skip
        if not total or not kinds or not torch.isfinite(torch.tensor([total, measured])).all():
            return
        tolerance = _tolerance(aligned[0].dtype, loss.dtype)
        fitting = {k: n for k, n in kinds.items() if abs(total / n - measured) <= tolerance * abs(measured)}
        if not fitting:
            assumed = next(iter(kinds.values()))
            self.report(
                f"the model's loss: {measured:.6g}, where the summed negative log-likelihood of the batch over its "
                f"{assumed:g} supervised tokens is {total / assumed:.6g}. The loss has other terms, weights or "
                "another alignment of labels than the likelihood that is attributed. Train with the plain loss "
                "of the model, or describe its likelihood by ResponseConfig(objective=...)"
            )
            return
        if self.kind is None:
            micro.tokens = next(iter(fitting.values()))
            # Where the step has one micro-batch, what the model is told is what it would count itself.
            self.kind = None if {"given", "supervised"} <= fitting.keys() else next(iter(fitting))

    def watch(self, micro: Any, batch: Mapping[str, Any], output: Any, first: bool) -> None:
        """Keep the loss until `backward`, and of a first micro-batch the gradient that reaches its logits."""
        loss, logits = output.get("loss"), output.get("logits")
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append((micro, loss.detach().clone()))  # the Trainer multiplies it in place
        if not first or not isinstance(logits, Tensor) or not logits.requires_grad or logits.ndim < 2:
            return
        rows, per_row = len(logits), logits[0].numel()
        if per_row > _LARGEST_ROW:
            return
        kept = max(1, min(rows, _CHUNK // max(1, per_row)))
        self._batch = {
            key: value[:kept] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for key, value in batch.items()
        }
        self._logits, self._gradient, self._micro = logits.detach()[:kept].clone(), None, micro

        def keep(gradient: Tensor | None) -> None:  # None where a loss does not depend on the logits
            self._gradient = None if gradient is None else gradient.detach()[:kept].clone()

        logits.register_hook(keep)

    def forget(self) -> None:
        """Let go of what was kept for a step."""
        self._losses, self._logits, self._gradient, self._batch = [], None, None, {}

    def backward(self, loss: Any, factor: Tensor | None) -> None:
        """Compare the loss that went backward with the losses of the model that it was made of.

        Args:
            loss (`Tensor`): that the loop called backward on.
            factor (`Tensor`, *optional*): gradient of the final scalar by it.
        """
        losses, self._losses = self._losses, []
        parts = [(micro, value) for micro, value in losses if micro.loss_gradient is not None]
        if factor is None or not parts or any(micro.least_gradient is not None for micro, _ in parts):
            return
        expected = sum(float(micro.loss_gradient) * float(value) for micro, value in parts)
        total, tolerance = float(loss) * float(factor), _tolerance(loss.dtype, parts[0][1].dtype)
        if torch.isfinite(torch.tensor([expected, total])).all() and abs(total - expected) > tolerance * abs(expected):
            self.report(
                f"the training loss: {float(loss):.6g}, where the loss that the model returned explains "
                f"{expected / float(factor):.6g} of it. Terms that were added to it (penalties, auxiliary losses) "
                "pull at the weights, and no response knows them. Train with the model's own loss"
            )

    def logits(self) -> None:
        """Compare the gradient that reached the logits with the likelihood's."""
        logits, gradient = self._logits, self._gradient
        if logits is None or gradient is None or self._micro.loss_gradient is None or self._micro.tokens is None:
            return
        dtype = logits.dtype
        logits = (logits if dtype == torch.float64 else logits.float()).requires_grad_()
        aligned = self._aligned(self._batch, {"logits": logits})
        if aligned is None:
            return
        with torch.enable_grad():
            summed = -log_probabilities(*aligned).sum()
        (expected,) = torch.autograd.grad(summed, logits)
        expected = expected * (float(self._micro.loss_gradient) / max(float(self._micro.tokens), 1.0))
        actual = gradient.to(expected)
        difference, size = float((actual - expected).norm()), float(expected.norm())
        # Zero: the returned logits are a copy that the loss did not pass through, and nothing else was made of them.
        if difference > _tolerance(dtype, gradient.dtype) * 3 * size and float(actual.norm()) > 0:
            share = difference / size if size else 1.0
            self.report(
                f"the gradient at the logits: it differs from that of the likelihood by {share:.2g} of its size. The "
                "training loss weighs tokens or adds terms made of logits, which no response knows. "
                "Train with the model's own loss"
            )

    def _aligned(self, batch: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
        """Return the objective's logits and labels from an output; None where it cannot be had without a forward."""
        if not isinstance(output.get("logits"), Tensor):
            return None
        answer = _Answer(self.model, {key: value for key, value in output.items() if key != "loss"})
        try:
            with torch.set_grad_enabled(output["logits"].requires_grad):
                logits, labels = self.objective.forward(answer, batch)  # type: ignore[arg-type]
                return (logits, labels) if logits.shape[:-1] == labels.shape else None
        except Exception:  # an objective that asks the model more than a forward pass
            return None

    def _router_loss(self, output: Any, loss: float) -> float:
        """Return the part of the loss that balances experts; reports one that is too large to be left out."""
        auxiliary = output.get("aux_loss")
        coefficient = getattr(getattr(self.model, "config", None), "router_aux_loss_coef", None)
        if not isinstance(auxiliary, Tensor) or not coefficient:
            return 0.0
        part = float(coefficient) * float(auxiliary)
        if abs(part) > _ROUTER_SHARE * abs(loss):
            self.report(
                f"router_aux_loss_coef={coefficient}: the router loss is {part / loss:.0%} of the training loss, and "
                "responses know the likelihood only. Set output_router_logits=False, or a coefficient of at most "
                f"{_ROUTER_SHARE * coefficient * loss / part:.1g}"
            )
        return part


def _refuse(message: str) -> None:
    raise UnsupportedError(message)


class _Answer:
    """Stand-in for a model that was called already: any call returns that output, everything else is the model's."""

    def __init__(self, model: nn.Module, output: dict[str, Any]):
        self._model, self._output = model, SimpleNamespace(**output)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Return the summed negative log-likelihood, a chunk of positions at a time."""
    logits, labels = logits.detach().flatten(0, -2), labels.flatten()
    supervised = (labels != IGNORED).nonzero().flatten()
    total = 0.0
    for part in supervised.split(max(1, _CHUNK // logits.shape[-1])):
        total -= float(log_probabilities(logits[part], labels[part].to(logits.device)).double().sum())
    return total


def _tolerance(*dtypes: torch.dtype) -> float:
    """Return the relative difference that rounding explains."""
    return 1e-2 if any(dtype in (torch.bfloat16, torch.float16) for dtype in dtypes) else 3e-4
