"""A real Ctrl-C while a model is put back as it was: it is put back, and then the interrupt is raised."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from hf_fwdattr.bank.bank import ResponseBank
from hf_fwdattr.models.compat import fused_activations
from hf_fwdattr.models.functional import _without_input_gradients
from hf_fwdattr.models.interrupts import uninterrupted
from hf_fwdattr.models.modes import frozen, refuse_batch_statistics, trainable
from hf_fwdattr.models.parameters import TrackedParameters
from hf_fwdattr.trainer.mode_check import _training_without_dropout
from hf_fwdattr.trainer.patching import Patches


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Interrupting(nn.Module):
    """A layer that sends the interrupt, once, when its mode or another attribute is set back."""

    armed = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.fire()

    def fire(self) -> None:
        if self.armed:
            Interrupting.armed = False
            interrupt()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Weight(nn.Parameter):
    """A weight that sends the interrupt when it is frozen or thawed."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        result = super().requires_grad_(requires_grad)
        if Interrupting.armed:
            Interrupting.armed = False
            interrupt()
        return result


def network() -> nn.Sequential:
    """Layers before and behind those that interrupt, all in training mode, one weight frozen."""
    model = nn.Sequential(nn.Linear(3, 3), Interrupting(), NewGELUActivation(), nn.Dropout(0.5), nn.Linear(3, 3))
    model[0].weight = Weight(torch.zeros(3, 3))
    model[0].bias.requires_grad_(False)
    return model.train()


def state(model: nn.Module) -> list[Any]:
    modes = [(module.training, dict(vars(module)).get("p"), "forward" in vars(module)) for module in model.modules()]
    hooks = [list(module._forward_hooks.values()) for module in model.modules()]
    return [modes, hooks, [parameter.requires_grad for parameter in model.parameters()]]


class FiringHooks(dict[int, Any]):
    """Hooks of a layer that send the interrupt when they are put back."""

    def clear(self) -> None:
        super().clear()
        if Interrupting.armed:
            Interrupting.armed = False
            interrupt()


def make_inputs_require_grads(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output


CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "frozen": frozen,
    "trainable": lambda model: trainable(list(model.parameters())),
    "training without dropout": _training_without_dropout,
    "without input gradients": _without_input_gradients,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_model_is_put_back_before_the_interrupt_is_raised(name: str) -> None:
    model = network()
    model[4]._forward_hooks = FiringHooks({1: make_inputs_require_grads, 2: print})
    before = state(model)
    with pytest.raises(KeyboardInterrupt), CONTEXTS[name](model):  # noqa: PT012
        assert state(model) != before
        Interrupting.armed = True
    assert not Interrupting.armed, "nothing was interrupted"
    assert state(model) == before


def test_every_patch_is_undone_before_the_interrupt_is_raised() -> None:
    """The patch that was made last interrupts while it is taken back; the one before it goes, too."""
    target, patches = Interrupting(), Patches()
    first = SimpleNamespace(value=1)
    patches.replace(first, value=2)
    patches.hook(SimpleNamespace(remove=interrupt))
    with pytest.raises(KeyboardInterrupt):
        patches.undo()
    assert first.value == 1
    assert target.training


class Copied(nn.Parameter):
    """A weight that sends the interrupt when it is written."""

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        result = super().copy_(source, non_blocking)
        Interrupting().fire()
        return result


def test_weights_of_queries_are_put_back() -> None:
    """The first of two weights is back when the interrupt comes."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for layer in model:
        layer.weight = Copied(torch.zeros(2, 2))
    parameters = TrackedParameters.of(model, "trainable")
    bank: Any = SimpleNamespace(_averaged_weights=torch.ones(parameters.size))
    with pytest.raises(KeyboardInterrupt), ResponseBank.query_weights(bank, model, parameters):  # noqa: PT012
        assert float(parameters.read(model).min()) == 1.0
        Interrupting.armed = True
    assert not Interrupting.armed
    assert float(parameters.read(model).abs().max()) == 0.0


def test_mode_that_was_tried_is_put_back() -> None:
    model = network().eval()
    before = state(model)
    Interrupting.armed = True  # fires while the model is put into training mode, and nothing is held back there
    with pytest.raises(KeyboardInterrupt):
        refuse_batch_statistics(model, training=True)
    assert state(model) == before


def test_activations_are_put_back_after_an_interrupt_among_them() -> None:
    model = nn.Sequential(NewGELUActivation(), NewGELUActivation())
    with pytest.raises(KeyboardInterrupt), fused_activations(model):  # noqa: PT012
        del vars(model[1])["forward"]  # as if the interrupt had come before it was replaced
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model)


def test_interrupt_is_raised_once_and_the_handler_is_back() -> None:
    handler = signal.getsignal(signal.SIGINT)
    finished = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        interrupt()
        interrupt()
        finished = True
    assert finished
    assert signal.getsignal(signal.SIGINT) is handler
    with uninterrupted():
        pass


def test_error_of_the_block_is_kept() -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_just_run_the_block() -> None:
    results = []

    def work() -> None:
        with uninterrupted():
            results.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [1]
