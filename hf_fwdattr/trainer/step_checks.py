"""Checks of the optimizer's steps: a few weights against what gradient, clipping, rate and state say of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.fsdp import is_shard
from ..response.distributed import SINGLE_PROCESS, Ranks
from .adafactor import clipping_factor, inverse_root
from .guard import Guard
from .optimizer import Preconditioner, skips_step
from .optimizer_state import AdamMoments, adam_moments, has_moments, is_low_bit
from .patching import Patches
from .value_checks import LossCheck, is_checked


__all__ = ["LoopChecks", "StepCheck"]

_WEIGHTS, _COMPONENTS = 6, 64  # tracked weights that are compared, and components of each
_MOST_UNDECIDED = 16  # micro-batches that are looked at until one shows the divisor of the loss


class StepCheck:
    """Comparison of an optimizer's steps on a sample of the tracked weights.

    Args:
        optimizer: torch's own, without wrappers.
        preconditioner (`Preconditioner`): what is assumed of it.
        weights (`dict[str, nn.Parameter]`): the tracked weights by name.
    """

    def __init__(self, optimizer: Any, preconditioner: Preconditioner, weights: dict[str, nn.Parameter]):
        self._optimizer, self._preconditioner, self._all = optimizer, preconditioner, weights
        groups = dict(zip(weights, preconditioner.groups, strict=True))
        firsts = {group: name for name, group in reversed(groups.items())}.values()  # one of each group
        names = dict.fromkeys([*firsts, *list(weights)[:: max(1, len(weights) // _WEIGHTS)]])
        self.names = [name for name in names if weights[name].numel()][: _WEIGHTS + len(set(groups.values()))]
        self._groups = {name: optimizer.param_groups[groups[name]] for name in self.names}
        self._trained = {name: weight.requires_grad for name, weight in weights.items()}
        self._backward: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor, AdamMoments | None]] = {}

    def after_backward(self, names: list[str] | None = None) -> None:
        """Keep the gradients as they are right after a backward pass."""
        for name in names or self.names:
            gradient = self._all[name].grad
            if gradient is not None and not gradient.is_sparse:
                self._backward[name] = _sample(gradient)

    def gradients(self, clip: float, scale: float) -> str | None:
        """Compare the gradients that the optimizer is given with those of the backward pass; keep both.

        Args:
            clip (`float`): factor of the clipping that was seen.
            scale (`float`): factor of the gradient scaler.

        Returns:
            A sentence about the first mismatch.
        """
        backward, self._backward, self._before, message = self._backward, {}, {}, None
        if skips_step(self._optimizer):
            return None
        for name in self.names:
            weight = self._all[name]
            if weight.grad is None or weight.grad.is_sparse:
                continue
            gradient = _sample(weight.grad)
            self._before[name] = _sample(weight), gradient, self._low_bit_moments(name)
            if name not in backward or not bool(torch.isfinite(gradient).all()):
                continue
            expected, tolerance = backward[name] * clip, _tolerance(weight.grad.dtype)
            errors = [_distance(gradient, expected / factor) for factor in {scale, 1.0}]
            if min(errors) > tolerance:
                share = float(gradient @ expected / (expected @ expected)) if float(expected.norm()) else float("inf")
                message = message or (
                    f"the gradient of {name}: {share:.3g} of what backward() left and clipping explains reaches the "
                    "optimizer. What changes gradients between backward() and optimizer.step() (clipping by torch, "
                    "noise, scaling) is not recorded. Clip with max_grad_norm or accelerator.clip_grad_norm_, and "
                    "leave gradients alone otherwise"
                )
        return message

    @torch.no_grad()
    def step(self) -> str | None:
        """Compare the step that was just taken with the optimizer's state; return a sentence about a mismatch."""
        before, self._before = self._before, {}
        for name, (old, gradient, moments) in before.items():
            weight, change = self._all[name], self._change(name, old, gradient, moments)
            if change is None or not bool(torch.isfinite(change).all()):
                continue
            moved = _sample(weight) - old
            rounding = torch.finfo(weight.dtype).eps * float(old.norm())
            if float((moved - change).norm()) > _tolerance(weight.dtype) * float(change.norm()) + rounding:
                return (
                    f"the step of {name}: the weights moved by {float(moved.norm()):.3g} where the optimizer's "
                    f"state and rate say {float(change.norm()):.3g}. Something else changes weights or skips steps "
                    "(a patched step, a hook, weights set during the step). Leave weights to the optimizer"
                )
        return None

    def settings(self) -> str | None:
        """Compare learning rates and frozen weights with those of the beginning; return a sentence about a change."""
        frozen = [name for name, weight in self._all.items() if weight.requires_grad != self._trained[name]]
        if frozen:
            return (
                f"{frozen[0]}: requires_grad changed while training ({len(frozen)} tracked weights). A segment of the "
                "run knows a weight as trained or as frozen. Freeze before training, or fine-tune in two runs"
            )
        groups = self._optimizer.param_groups
        base = groups[self._preconditioner.groups[0]]
        for index in sorted(set(self._preconditioner.groups)):
            group = groups[index]
            expected, theirs = _first_rate(group) * float(base["lr"]), _first_rate(base) * float(group["lr"])
            if abs(expected - theirs) > 1e-6 * max(abs(expected), abs(theirs)):
                return (
                    f"the learning rate of parameter group {index}: {float(group['lr']):.3g}, where its first rate "
                    f"and the schedule of the first group say {expected / (_first_rate(base) or 1.0):.3g}. "
                    "Responses know one schedule. Give all groups of tracked weights the same one"
                )
        return None

    def record_update_clipping(self) -> None:
        """Record by how much Adafactor clipped the updates of its step; does nothing for other optimizers."""
        if self._preconditioner.kind == "adafactor":
            groups = self._optimizer.param_groups
            for index, weight in zip(self._preconditioner.groups, self._all.values(), strict=True):
                state = self._optimizer.state.get(weight, {})
                self._preconditioner.update_clipping.record(weight, state, groups[index])

    def _low_bit_moments(self, name: str) -> AdamMoments | None:
        """Return a sample of the moments that the coming step reads, where those it leaves are rounded to few bits."""
        state = self._optimizer.state.get(self._all[name], {})
        return _sampled(adam_moments(state, self._groups[name], exact=True)) if is_low_bit(state) else None

    def _change(self, name: str, old: Tensor, gradient: Tensor, moments: AdamMoments | None) -> Tensor | None:
        """Return the step of a weight's sample by the formulas of the optimizer; None where it is not known."""
        group, state = self._groups[name], self._optimizer.state.get(self._all[name], {})
        rate, decay = float(group["lr"]), float(group.get("weight_decay") or 0.0)
        if self._preconditioner.kind == "sgd":
            buffer = state.get("momentum_buffer")
            gradient = gradient / float(getattr(self._optimizer, "grad_scale", None) or 1.0)  # in float16, fused
            return -rate * (gradient + decay * old if buffer is None else _sample(buffer))
        if self._preconditioner.kind == "adafactor":
            return self._adafactor_change(name, old, gradient)
        if not has_moments(state) or (is_low_bit(state) and group.get("amsgrad")):
            return None
        if is_low_bit(state):
            zeros = torch.zeros_like(gradient)
            moments = (moments or AdamMoments(zeros, zeros, 0.0)).after(gradient, group)
        else:
            moments = _sampled(adam_moments(state, group, exact=True))
        return -rate * (decay * old + moments.step(group))

    def _adafactor_change(self, name: str, old: Tensor, gradient: Tensor) -> Tensor | None:
        weight, group = self._all[name], self._groups[name]
        state, rate, decay = self._optimizer.state.get(weight, {}), float(group["lr"]), float(group["weight_decay"])
        if "step" not in state or weight.grad is None:
            return None
        if group["beta1"] is not None:  # moving average of steps, their rates included
            return -rate * decay * old - _sample(state["exp_avg"])
        root = inverse_root(state)
        update = _sample(root) * gradient * float(clipping_factor(weight.grad, root, group))
        return -rate * (decay * old + update)


class LoopChecks:
    """All comparisons of values in a training loop: at the first step a mismatch is refused, later it is noted.

    Under several processes a mismatch that one of them sees before its first step is kept until the optimizer is
    called, which every process does, and refused on all of them there: none waits for another that has gone.

    Args:
        loss (`LossCheck`): of losses and logits.
        step (`StepCheck`): of optimizer steps.
        guard (`Guard`): knows whether training has begun.
        note (`Callable`): is given each later mismatch.
        ranks (`Ranks`, *optional*): the processes of the run.
    """

    def __init__(
        self,
        loss: LossCheck,
        step: StepCheck,
        guard: Guard,
        note: Callable[[str], None],
        ranks: Ranks = SINGLE_PROCESS,
    ):
        self.loss, self.step, self._guard, self._note = loss, step, guard, note
        self._ranks, self._together = ranks, ranks.size == 1
        self._kept: str | None = None
        loss.report = self.report
        self.count, self.changed = 0, False
        self._undecided = _MOST_UNDECIDED

    @property
    def active(self) -> bool:
        """True where the values of the coming step are compared."""
        return is_checked(self.count) and self._guard.error is None

    def attach(self, accelerator: Any, processes: int, patches: Patches) -> None:
        """Watch backward passes: where gradients are shared by processes after Accelerate's, else at the weights."""
        if accelerator is not None:
            self._backward = accelerator.backward
            patches.replace(accelerator, backward=self._watched_backward)
        self._shared = processes > 1 or any(is_shard(weight) for weight in self.step._all.values())
        if not self._shared:
            for name in self.step.names:
                weight = self.step._all[name]
                if weight.requires_grad:
                    patches.hook(weight.register_post_accumulate_grad_hook(lambda _, name=name: self._arrived(name)))

    def output(self, micro: Any, batch: dict[str, Any], output: Any, index: int) -> None:
        """Compare the output of a micro-batch, the `index`-th of its step, counted from 1."""
        undecided = index > 1 and self.loss.kind is None and self._undecided > 0
        self._undecided -= undecided
        if self.active:
            self.loss.watch(micro, batch, output, first=index == 1 and self.count == 0)
        if undecided or (self.active and index == 1):
            self.loss.value(micro, batch, output)

    def before_step(self, clip: Any, scale: float) -> None:
        """Compare, right before the optimizer's step, all that led to its gradients; collective at the first."""
        with self._on_all_ranks():
            if not self.changed:
                message = self.step.settings()
                self.changed = message is not None
                self.report(message)
            if self.active:
                self.loss.logits()
                self.report(self.step.gradients(min(1.0, float(clip)), scale))

    def after_step(self) -> None:
        """Compare the step that was just taken; collective at the first."""
        with self._on_all_ranks():
            if self.active:
                self.report(self.step.step())
        self.step.record_update_clipping()
        self.loss.forget()
        self.count += 1

    @contextmanager
    def _on_all_ranks(self) -> Iterator[None]:
        """Raise on all ranks, until training has begun, what one of them reports in the block or has kept."""
        if self._guard.training or self._ranks.size == 1:
            yield
            return
        self._together = True
        try:
            with self._ranks.raise_on_all_ranks():
                kept, self._kept = self._kept, None
                self.report(kept)
                yield
        finally:
            self._together = False

    def report(self, message: str | None) -> None:
        """Refuse a mismatch before training has begun, and pass it on later.

        Raises:
            UnsupportedError: training has not begun; under several processes, where all of them are.
        """
        if message is None:
            return
        if self._guard.training:
            self._note(f"step {self.count + 1}: {message}")
        elif self._together:
            raise UnsupportedError(message)
        else:
            self._kept = self._kept or message

    def _arrived(self, name: str) -> None:
        if self.active:
            with self._guard():
                self.step.after_backward([name])

    def _watched_backward(self, loss: Any, **kwargs: Any) -> None:
        """Call Accelerate's backward, and compare the loss that it is given."""
        factors: list[Tensor] = []
        if self.active and isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            loss.register_hook(lambda gradient: factors.append(gradient.detach()))
        self._backward(loss, **kwargs)
        if self.active:
            with self._guard():
                self.loss.backward(loss.detach(), factors[0] if factors else None)
                if self._shared:
                    self.step.after_backward()


def _first_rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _sample(tensor: Tensor) -> Tensor:
    """Return some components of this process's part of a tensor, as float64."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _COMPONENTS)][:_COMPONENTS].to(torch.float64, copy=True)


def _sampled(moments: AdamMoments) -> AdamMoments:
    return AdamMoments(_sample(moments.first), _sample(moments.second), moments.steps)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two vectors; 0 of two zeros."""
    difference, size = float((actual - expected).norm()), float(expected.norm())
    return difference / size if size else float(difference > 0)


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
