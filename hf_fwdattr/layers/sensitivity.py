"""Sensitivity check of attentions: the same call with amplified queries and keys.

Rotary positions, scales and caps hardly show in the output of an attention whose weights are nearly uniform, and yet
they determine its derivatives. With amplified logits the weights are sharp, and values show all operations on them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .activations import ActivationRecorder
from .attention import Attention


__all__ = ["record_amplified"]

_LOGIT_STD = 3.0  # standard deviation of amplified logits, about


def record_amplified(block: Attention, model: nn.Module, recorder: ActivationRecorder) -> ActivationRecorder:
    """Call an attention as in the recorded pass, with longer queries and keys, and record it."""
    module: Any = model.get_submodule(block.path)
    outputs = [recorder.outputs[path] for path in block.inputs]
    query, key = (outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1))[:2]
    lengths = query.float().square().mean() * key.float().square().mean() * module.head_dim
    factor = max(1.0, (_LOGIT_STD / (module.scaling * float(lengths.sqrt()) or _LOGIT_STD)) ** 0.5)

    def amplify(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        if len(block.inputs) == 3:
            return output * factor
        query, key, value = output.chunk(3, dim=-1)
        return torch.cat([query * factor, key * factor, value], dim=-1)

    handles = [model.get_submodule(path).register_forward_hook(amplify) for path in block.inputs[:2]]
    try:
        with ActivationRecorder(model, block.linears, {block.path}) as amplified:
            module(*recorder.args[block.path], **recorder.kwargs[block.path])
    finally:
        for handle in handles:
            handle.remove()
    return amplified
