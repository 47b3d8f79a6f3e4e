"""Attentions asked again with sharp logits: where they are nearly uniform, values tell nothing of queries and keys.

What queries and keys go through (rotary positions, scales, caps) hardly shows in the output of an attention that looks
everywhere alike, and is all that matters to how it moves with them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .activations import ActivationRecorder
from .attention import Attention


_SHARP = 3.0  # standard deviation of logits, about


def sensitivity_inputs(block: Attention, model: nn.Module, seen: ActivationRecorder) -> ActivationRecorder:
    """What goes through an attention, called as it was, with queries and keys so long that it has to choose."""
    module: Any = model.get_submodule(block.path)
    outputs = [seen.outputs[path] for path in block.inputs]
    query, key = (outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1))[:2]
    lengths = query.float().square().mean() * key.float().square().mean() * module.head_dim
    factor = max(1.0, (_SHARP / (module.scaling * float(lengths.sqrt()) or _SHARP)) ** 0.5)
    loud = ActivationRecorder(arguments=seen.arguments)

    def louder(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        if len(block.inputs) == 3:
            return output * factor
        query, key, value = output.chunk(3, dim=-1)
        return torch.cat([query * factor, key * factor, value], dim=-1)

    def keep(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            loud.inputs[path], loud.outputs[path] = inputs[0], output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(louder) for path in block.inputs[:2]]
    for path in (*block.inputs, block.output):
        handles.append(model.get_submodule(path).register_forward_hook(keep(path)))
    try:
        module(*seen.positional[block.path], **seen.arguments[block.path])
    finally:
        for handle in handles:
            handle.remove()
    return loud
