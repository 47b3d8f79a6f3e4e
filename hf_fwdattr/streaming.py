"""Tokens with what is behind each, while the text is being generated."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .readout.decoding import Decoding


class _Tokens(BaseStreamer):
    """Reads each new token where `generate` hands it over, and passes both on."""

    def __init__(self, decoding: Decoding, found: "queue.Queue[Any]"):
        self._decoding, self._found, self._prompt = decoding, found, True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # the first thing that a streamer is shown
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._found.put((token, self._decoding.read(token).cpu()))

    def end(self) -> None:
        """The thread that generates says when it is done."""


class _Stopped(StoppingCriteria):
    """Ends the generation when nobody listens any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def streamed(model: nn.Module, decoding: Decoding, prompt: Tensor, settings: dict[str, Any]) -> Iterator[Any]:
    """(token, (k,) derivatives of its log-likelihood) of each token, as soon as it is chosen.

    `generate` runs in a thread of its own, which ends with the iterator; whatever it raises is raised here. The model
    must not be used elsewhere meanwhile.

    Args:
        prompt (`Tensor`): (n,) token ids.
        settings (`dict`): of `generate`.
    """
    found: queue.Queue[Any] = queue.Queue()
    stopped = _Stopped()
    stopping = [*settings.get("stopping_criteria", []), stopped]
    inputs: Any = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}

    def work() -> None:
        try:
            with decoding.riding():  # its settings are a thread's own
                generate: Any = model.generate
                generate(
                    **inputs, **(settings | {"stopping_criteria": stopping}), streamer=_Tokens(decoding, found)
                )  # fmt: skip
            found.put(None)
        except BaseException as error:  # handed to the thread that listens
            found.put(error)

    thread = threading.Thread(target=work, name="hf_fwdattr-generate", daemon=True)
    thread.start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.event.set()
        thread.join()
