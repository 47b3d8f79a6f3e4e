"""Functional calls: a module with other weights in place of its own, under torch.func's transforms too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .interrupts import uninterrupted


__all__ = ["call_with_weights"]

# Names of the hooks by which transformers and PEFT let gradients through a frozen embedding (gradient checkpointing).
_INPUT_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")


def call_with_weights(module: nn.Module, weights: Mapping[str, Tensor], *args: Any) -> Any:
    """Call a module with the weights of these names replaced wherever they are used, tied copies included.

    Two things that `torch.func.functional_call` does not do by itself. It leaves a replaced weight behind in a module
    that is registered twice, as PEFT's adapter of the tokens of a tied embedding is; here each attribute is replaced
    once. And it fails on the hooks of `enable_input_require_grads`, which are left out of this call.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    by_parameter = {id(named[name]): weight for name, weight in weights.items()}
    replaced: dict[str, Tensor] = {}
    attributes = set()
    for name, parameter in named.items():
        if id(parameter) in by_parameter:
            path, _, leaf = name.rpartition(".")
            attribute = id(module.get_submodule(path)), leaf
            if attribute not in attributes:
                attributes.add(attribute)
                replaced[name] = by_parameter[id(parameter)]
    with _without_input_gradients(module):
        return functional_call(module, replaced, args, tie_weights=False)


@contextmanager
def _without_input_gradients(model: nn.Module) -> Iterator[None]:
    """Take the hooks out that make the outputs of embeddings require gradients, and put all hooks back in order."""
    removed = []
    for module in model.modules():
        hooks = module._forward_hooks
        if hooks and any(getattr(hook, "__name__", "") in _INPUT_GRADIENTS for hook in hooks.values()):
            removed.append((hooks, list(hooks.items())))
    try:
        for hooks, items in removed:
            for key, hook in items:
                if getattr(hook, "__name__", "") in _INPUT_GRADIENTS:
                    del hooks[key]
        yield
    finally:
        with uninterrupted():
            for hooks, items in removed:
                hooks.clear()
                hooks.update(items)
