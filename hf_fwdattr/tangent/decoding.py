"""Readout while a text is generated, written out: tangents follow each token, with key-value caches of their own."""

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import fused
from ..objective import Objective
from ..parameters import Parameters
from ..readout.decoding import Decoding, check_cache
from ..synthetic.trace import Seen
from .block import Past
from .layer import LayerPoint, layers_of
from .linear import Linears
from .norm import Norm
from .read import check_chain, watching


class WrittenDecoding(Decoding):
    """As [`Decoding`], without torch's forward mode: the model runs as always and is watched.

    Args:
        model (`nn.Module`): one that `Tangents` has accepted.
        dtype (`torch.dtype`): of the products that probes pass through.
    """

    def __init__(
        self, model: nn.Module, parameters: Parameters, objective: Objective, probes: Tensor, dtype: torch.dtype
    ):
        super().__init__(model, parameters, objective, probes)
        self._outer, self._layers = model, layers_of(model)
        self._linears = Linears(model, parameters, dtype)
        self._seen, self._pasts, self._due = Seen(), list[Past](), False
        self._norms, self._hidden = list[tuple[nn.Module, Tensor, Tensor]](), list[Tensor]()

    @contextmanager
    def riding(self) -> Iterator[None]:
        """While this is open, tangents follow what the model generates."""
        self._unread, self._pasts = deque(), [Past() for _ in self._layers]
        watched = {path for layer in self._layers for path in layer.watched}
        attentions = {layer.blocks[0].path for layer in self._layers}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(fused(self._outer))
            stack.callback(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            things = watched, attentions, self._seen, self._norms, self._hidden
            stack.enter_context(watching(self._outer, self.head, *things))
            stack.callback(self.head.register_forward_pre_hook(self._step).remove)
            yield

    def _before(self, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        check_cache(inputs, self._pasts[0].length)
        for kept in (self._seen.inputs, self._seen.outputs, self._seen.arguments):
            kept.clear()
        self._norms.clear()
        self._hidden.clear()
        self._due = True

    def _step(self, _: nn.Module, __: tuple[Tensor, ...]) -> None:
        """The layers have run: follow them."""
        if not self._due:
            return  # `read` asks the output layer as well
        self._due = False
        hidden = self._hidden[-1]
        check_chain(self._layers, self._seen, self._norms, hidden)
        moved = None
        for layer, past in zip(self._layers, self._pasts, strict=True):
            moved = LayerPoint(self._outer, layer, self._seen, self._linears, past).push(moved, list(self._directions))
        assert moved is not None
        module, x, y = self._norms[-1]
        moved = Norm("the last norm", module, x[:, -1:], y[:, -1:]).push(moved[:, :, -1:])
        self._unread.append((hidden[:, -1:], moved[:, 0, -1]))
