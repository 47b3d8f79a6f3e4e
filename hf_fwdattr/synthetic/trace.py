"""What one forward pass shows to hooks: inputs and outputs of layers, and the error that the logits make."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import fused
from ..errors import UnsupportedError
from ..objective import Batch, Likelihood, Objective
from ..readout.head import covectors
from .adjoint import layer_norm, rms_norm


@dataclass
class Seen:
    """What layers did in one forward pass.

    Attributes:
        inputs, outputs (`dict`): path -> tensor (rows, positions, features).
        arguments, positional (`dict`): path of an attention -> its keyword arguments, and the others.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    positional: dict[str, tuple[Any, ...]] = field(default_factory=dict)


class Trace(Seen):
    """One forward pass of a batch, watched.

    Args:
        layers: paths of layers whose input and output are kept.
        blocks: paths of attentions, whose arguments (mask, rotary positions) are kept.
        targets: paths of layers whose output shall be differentiable; the pass is then made with a graph.

    Attributes:
        logits, labels (`Tensor`): of the objective.
        error (`Tensor`): (rows, positions, features) derivative of each supervised token's log-likelihood by the last
            residual state of its position; zero elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        head: nn.Module,
        batch: Batch,
        layers: set[str],
        blocks: set[str],
        targets: frozenset[str] = frozenset(),
    ):
        super().__init__()
        self._norms: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._hidden: list[Tensor] = []
        handles = [head.register_forward_pre_hook(lambda _, inputs: self._hidden.append(inputs[0].detach()))]
        for path, module in model.named_modules():
            if path in layers:
                handles.append(module.register_forward_hook(self._layer(path, path in targets)))
            if path in blocks:
                handles.append(module.register_forward_pre_hook(self._block(path), with_kwargs=True))
            if gain_of(module) is not None:
                handles.append(module.register_forward_hook(self._norm))
        try:
            with fused(model), torch.set_grad_enabled(bool(targets)):
                self.logits, self.labels = Likelihood(model, objective)(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.error = self._error(head)

    def _layer(self, path: str, target: bool) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if path in self.inputs:
                raise UnsupportedError(f"{path} is used twice in one pass: its gradient cannot be predicted from it")
            self.inputs[path] = inputs[0].detach()
            if not target:
                self.outputs[path] = output.detach()
                return None
            self.outputs[path] = output if output.requires_grad else output.detach().requires_grad_(True)
            return self.outputs[path].clone()

        return hook

    def _block(self, path: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.arguments[path] = kwargs

        return hook

    def _norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._norms = [(module, inputs[0].detach(), output.detach())]  # the last one is the final norm, if any

    def _error(self, head: nn.Module) -> Tensor:
        hidden = self._hidden[-1]
        bracket = covectors(head, hidden, self.logits.detach(), self.labels)
        if bracket is None:
            raise UnsupportedError("between the last hidden state and the logits is more than one Linear layer")
        if not self._norms:
            return bracket
        module, x, y = self._norms[-1]
        if y.shape != hidden.shape or not torch.equal(y, hidden):
            return bracket
        before = before_norm(module, x, y, bracket)
        return bracket if before is None else before


@dataclass(frozen=True)
class Form:
    """How a norm was computed.

    Attributes:
        pull (`Callable`): `layer_norm` or `rms_norm`, of `adjoint`.
        gain (`Tensor`): (d,) what it multiplies with.
        eps (`float`): what it adds to the mean square.
    """

    pull: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    gain: Tensor
    eps: float


def form_of(module: nn.Module, x: Tensor, y: Tensor) -> Form | None:
    """The form that makes `y` of `x`; None if the norm is another one, or none at all.

    Whether it centres is told by its class: where the mean of `x` is small, values do not tell.
    """
    gain, eps = gain_of(module), _eps(module)
    if gain is None:
        return None
    form = layer_norm if isinstance(module, nn.LayerNorm) else rms_norm
    wide = y.dtype if y.dtype == torch.float64 else torch.float32
    x, gain, bias = x.to(wide), gain.to(wide), getattr(module, "bias", None)
    expected = y.to(wide) - (0.0 if bias is None else bias.to(wide))
    tolerance = 1e-3 if y.dtype in (torch.float32, torch.float64) else 3e-2
    centred = x - x.mean(-1, keepdim=True) if form is layer_norm else x
    unit = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    scales = gain, 1.0 + gain  # Gemma's gains are offsets from one
    errors = [float((unit * scale - expected).norm()) for scale in scales]
    best = errors.index(min(errors))
    return Form(form, scales[best], eps) if errors[best] <= tolerance * float(expected.norm()) else None


def before_norm(module: nn.Module, x: Tensor, y: Tensor, error: Tensor) -> Tensor | None:
    """The error (rows, positions, ..., d) before a norm, from the one behind it; None if the norm is another one.

    Args:
        x, y: what went into the norm and what came out of it; may have more positions than `error`.
    """
    x, y = x[:, : error.shape[1]], y[:, : error.shape[1]]
    form = form_of(module, x, y)
    return None if form is None else form.pull(x.to(error.dtype), form.gain.to(error.dtype), error, form.eps)


def gain_of(module: nn.Module) -> Tensor | None:
    """The gain of a layer norm or RMS norm."""
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    gain = getattr(module, "weight", None)
    return gain.detach() if named and isinstance(gain, Tensor) and gain.ndim == 1 else None


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "eps", None) or getattr(module, "variance_epsilon", None) or 1e-6)
