"""Readout while a text is generated: each probe's tangent decodes along with the token, with its own key-value cache.

`generate` runs as always; in place of the model's forward stands one that carries, beside each activation, its
derivatives along the probes, and keeps those of keys and values as it keeps keys and values. So a token's derivatives
are there when it has been chosen, and no pass over the finished text is needed. Same numbers as `jvp.read`.
"""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..activation import fused
from ..errors import NumericalError, UnsupportedError
from ..kernels import refuse_resting_adapters
from ..objective import Objective
from ..parameters import Parameters
from .head import covectors, output_layer
from .scale import unit


class _Body(nn.Module):
    """The model's own forward, whatever stands in its place at the moment, with weights that can be replaced."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, **inputs: Any) -> Any:
        return type(self.model).forward(self.model, **inputs)


class Decoding:
    """Derivatives of each generated token's log-likelihood along probes, as the tokens come.

    ```python
    decoding = Decoding(model, parameters, CAUSAL_LM, probes)
    with decoding.riding():
        model.generate(**prompt, streamer=streamer)  # its `put(token)` may call decoding.read(token)
    ```

    Args:
        model (`nn.Module`): a causal language model in evaluation mode.
        probes (`Tensor`): (k, P) directions.

    Raises:
        UnsupportedError: training mode, or no plain output layer that does not respond.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, objective: Objective, probes: Tensor):
        if any(module.training for module in model.modules()):
            raise UnsupportedError("the model is in training mode, where dropout is random; call model.eval()")
        refuse_resting_adapters(model, parameters.live)
        head = output_layer(model, parameters, objective)
        if head is None:
            raise UnsupportedError(
                "reading while generating wants a causal language model whose output layer is a plain Linear that "
                "does not respond; read the finished text instead"
            )
        unwrap = getattr(model, "get_base_model", None)  # PeftModel has it
        self.model: Any = unwrap() if callable(unwrap) else model
        self.head: Any = head
        prefix = next(name for name, module in model.named_modules() if module is self.model)
        names = [name.removeprefix(f"{prefix}.") if prefix else name for name in parameters.live]
        self._names = [f"model.{name}" for name in names]
        self._weights = tuple(tensor.detach() for tensor in parameters.tensors(model))
        directions, self._factors = unit(probes)
        pieces = parameters.split(directions)
        self._directions = tuple(p.to(w.dtype) for p, w in zip(pieces, self._weights, strict=True))
        self._past: list[Tensor] = []  # keys and values, layer by layer
        self._moved: list[Tensor] = []  # (k, ...) their tangents
        self._unread: deque[tuple[Tensor, Tensor]] = deque()  # last hidden states and their tangents

    @contextmanager
    def riding(self) -> Iterator[None]:
        """While this is open, the model's forward carries the tangents; restored whatever happens."""
        self._past, self._moved, self._unread = [], [], deque()
        self.model.forward = self._forward
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fused(self.model):
                yield
        finally:
            del self.model.forward

    def read(self, token: int) -> Tensor:
        """(k,) derivatives of the log-likelihood of `token` at the first position not yet read; float32 or better.

        Every token is to be read, in order; on a GPU `generate` hands them over a step late.

        Raises:
            NumericalError: a derivative that is not finite.
        """
        hidden, moved = self._unread.popleft()
        label = torch.tensor([[token]], device=hidden.device)
        bracket = covectors(self.head, hidden, self.head(hidden), label)
        assert bracket is not None
        result = moved.to(bracket.dtype) @ bracket[0, 0] * self._factors.to(bracket.dtype)
        if not bool(torch.isfinite(result).all()):
            raise NumericalError("a derivative of the token's log-likelihood is not finite: is the model's own NaN?")
        return result

    def _forward(self, **inputs: Any) -> Any:
        """What the model would have returned, with the tangents of its last hidden state kept aside."""
        before = self._past[0].shape[-2] if self._past else 0
        check_cache(inputs, before)
        cache = inputs.pop("past_key_values")
        empty = cache if not before else _emptied(cache)
        body, kept = _Body(self.model), {}

        def run(weights: tuple[Tensor, ...], past: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            grown = copy.deepcopy(empty)
            for layer, (keys, values) in zip(grown.layers, _pairs(past), strict=False):
                layer.update(keys, values)
            named = dict(zip(self._names, weights, strict=True))
            output = functional_call(body, named, (), inputs | {"past_key_values": grown, "use_cache": True})
            kept["output"] = output
            layers = output.past_key_values.layers
            return output.logits, tuple(tensor for layer in layers for tensor in (layer.keys, layer.values))

        if not before:
            self._check(inputs, copy.deepcopy(cache))

        def derivative(weights: tuple[Tensor, ...], past: tuple[Tensor, ...]) -> Any:
            return jvp(run, (self._weights, tuple(self._past)), (weights, past))

        self.head.forward = lambda hidden: hidden  # tangents end here: `read` needs them along one covector only
        try:
            out: Any = (None, 0)  # what is computed is the same for all probes, its tangents are not
            (hidden, past), (moved, pasts) = vmap(derivative, out_dims=out)(self._directions, tuple(self._moved))
        finally:
            del self.head.forward
        self._past, self._moved = list(past), list(pasts)
        self._unread.append((hidden[:, -1:], moved[:, 0, -1]))
        return self._told(kept["output"], self.head(hidden), empty)

    def _told(self, output: Any, logits: Tensor, empty: Any) -> Any:
        """The model's output with plain tensors in place of those that carried tangents."""
        cache = copy.deepcopy(empty)
        for layer, (keys, values) in zip(cache.layers, _pairs(self._past), strict=False):
            layer.update(keys, values)
        return type(output)(logits=logits, past_key_values=cache)

    def _check(self, inputs: dict[str, Any], cache: Any) -> None:
        """Once a text: that logits are the output layer's and nothing else's."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits = type(self.model).forward(self.model, **inputs, past_key_values=cache).logits
        finally:
            handle.remove()
        labels = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
        if covectors(self.head, seen[-1], logits, labels) is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} does more than its output layer to its logits (soft capping, scaling); "
                "read the finished text instead"
            )


def check_cache(inputs: dict[str, Any], before: int) -> None:
    """Refuse what a model is called with if tangents cannot follow.

    Args:
        inputs (`dict`): keyword arguments of the model's forward.
        before (`int`): positions that tangents are known for.

    Raises:
        UnsupportedError: several texts, embeddings, or a cache that does not hold these positions and grow.
    """
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if ids is None or len(ids) != 1:
        raise UnsupportedError("reading while generating takes one text at a time, without beams or embeddings")
    if cache is None or not all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers):
        raise UnsupportedError(
            "reading while generating wants the plain growing key-value cache (use_cache=True, no sliding "
            "window); read the finished text instead"
        )
    if cache.get_seq_length() != before:
        raise UnsupportedError(
            "the cache was cut or filled from elsewhere (assisted decoding?): its tangents fit no more"
        )


def _pairs(tensors: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, from one flat list."""
    return zip(tensors[0::2], tensors[1::2], strict=True)


def _emptied(cache: Any) -> Any:
    """A cache of the same kind with nothing in it."""
    fresh = copy.copy(cache)
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fresh.layers:
        layer.reset()
    return fresh
