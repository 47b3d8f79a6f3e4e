"""Activations of one forward pass, recorded by hooks."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from .norm import norm_gain


__all__ = ["ActivationRecorder", "NormCall"]


@dataclass(frozen=True)
class NormCall:
    """One call of a norm."""

    module: nn.Module
    input: Tensor
    output: Tensor


class ActivationRecorder:
    """Context manager that records what a model's layers compute in one forward pass.

    Args:
        paths: layers whose input and output are recorded.
        attentions: paths of attentions whose arguments are recorded.
        head (`nn.Module`, *optional*): the output layer; with it, its input and output and the last norm are recorded.
        targets: paths, among `paths`, whose outputs are recorded differentiably.

    Attributes:
        inputs, outputs (`dict[str, Tensor]`): path -> (rows, positions, features).
        args, kwargs (`dict`): path of an attention -> its positional and keyword arguments (mask, rotary positions).
        hidden, head_output (`Tensor`, *optional*): what entered and what left the output layer.
        last_norm (`NormCall`, *optional*): the norm that was called last.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Collection[str],
        attentions: Collection[str] = (),
        head: nn.Module | None = None,
        targets: Collection[str] = (),
    ):
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.args: dict[str, tuple[Any, ...]] = {}
        self.kwargs: dict[str, dict[str, Any]] = {}
        self.hidden: Tensor | None = None
        self.head_output: Tensor | None = None
        self.last_norm: NormCall | None = None
        self._model, self._paths, self._attentions = model, paths, attentions
        self._head, self._targets = head, targets

    def __enter__(self) -> "ActivationRecorder":
        self._handles: list[Any] = []
        try:
            self._register()
        except BaseException:  # Ctrl-C too: no hook may stay
            self.__exit__()
            raise
        return self

    def _register(self) -> None:
        for path in self._paths:
            hook = self._layer_hook(path)
            self._handles.append(self._model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        for path in self._attentions:
            hook = self._attention_hook(path)
            self._handles.append(self._model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        if self._head is not None:
            self._handles.append(self._head.register_forward_hook(self._record_head, prepend=True))
            for norm in [module for module in self._model.modules() if norm_gain(module) is not None]:
                self._handles.append(norm.register_forward_hook(self._record_norm))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _layer_hook(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if path in self.inputs:
                raise UnsupportedError(f"{path} is called twice in one forward pass, and only one call is recorded")
            self.inputs[path] = _detached(args[0] if args else kwargs["hidden_states"])
            output = output[0] if isinstance(output, tuple) else output
            if path not in self._targets:
                self.outputs[path] = _detached(output)
                return None
            self.outputs[path] = output if output.requires_grad else output.detach().requires_grad_(True)
            return self.outputs[path].clone()

        return hook

    def _attention_hook(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.args[path], self.kwargs[path] = args, kwargs

        return hook

    def _record_head(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.hidden, self.head_output = _detached(args[0]), _detached(output)

    def _record_norm(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.last_norm = NormCall(module, _detached(args[0]), _detached(output))


def _detached(tensor: Tensor) -> Tensor:
    """Detach a tensor from the graph; outside of one return it as it is, as its identity matters."""
    return tensor.detach() if tensor.requires_grad else tensor
