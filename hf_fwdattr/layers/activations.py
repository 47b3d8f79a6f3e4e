"""What one forward pass shows to hooks: inputs and outputs of layers, and the error that the logits make."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.compat import fused_activations
from ..models.likelihood import Batch, Likelihood, Objective
from ..models.output_head import hidden_state_gradients
from .norm import norm_gain, norm_vjp


@dataclass
class ActivationRecorder:
    """What layers did in one forward pass.

    Attributes:
        inputs, outputs (`dict`): path -> tensor (rows, positions, features).
        arguments, positional (`dict`): path of an attention -> its keyword arguments, and the others.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    positional: dict[str, tuple[Any, ...]] = field(default_factory=dict)


class PredictorActivations(ActivationRecorder):
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
            if norm_gain(module) is not None:
                handles.append(module.register_forward_hook(self._norm))
        try:
            with fused_activations(model), torch.set_grad_enabled(bool(targets)):
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
        hidden_gradients = hidden_state_gradients(head, hidden, self.logits.detach(), self.labels)
        if hidden_gradients is None:
            raise UnsupportedError("between the last hidden state and the logits is more than one Linear layer")
        if not self._norms:
            return hidden_gradients
        module, x, y = self._norms[-1]
        if y.shape != hidden.shape or not torch.equal(y, hidden):
            return hidden_gradients
        before = norm_vjp(module, x, y, hidden_gradients)
        return hidden_gradients if before is None else before


@contextmanager
def watching(
    model: nn.Module, head: nn.Module, watched: set[str], attentions: set[str], seen: ActivationRecorder,
    norms: list[tuple[nn.Module, Tensor, Tensor]], hidden: list[Tensor],
) -> Iterator[None]:  # fmt: skip
    """While this is open, what goes through these layers is kept: in `seen`, what each norm does, the last one last,
    and what reaches the output layer.
    """

    def keep(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path in seen.inputs:
                raise UnsupportedError(f"{path} is used twice in one pass")
            seen.inputs[path] = inputs[0] if inputs else kwargs["hidden_states"]
            seen.outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook

    def argue(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.positional[path], seen.arguments[path] = inputs, kwargs

        return hook

    def last(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        norms[:] = [(module, inputs[0], output)]

    handles = [head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))]
    for path, module in model.named_modules():
        if path in watched:
            handles.append(module.register_forward_hook(keep(path), with_kwargs=True))
        if path in attentions:
            handles.append(module.register_forward_pre_hook(argue(path), with_kwargs=True))
        if norm_gain(module) is not None:
            handles.append(module.register_forward_hook(last))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
