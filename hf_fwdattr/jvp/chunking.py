"""How many directions fit into memory at once."""

import torch
from torch import Tensor, nn

from ..models.likelihood import Batch


_CPU_BUDGET = 1 << 30  # bytes of tangents in flight on a CPU, at most
# Tangents that leave the caches cost more than running the model once more for another handful of directions, so on a CPU
# directions go in handfuls: at least this many (fewer do not amortise the model's own pass), or what fits these bytes.
_CPU_HANDFUL, _CPU_CACHE = 16, 3 << 24
_ALIVE = 6  # activations of the widest layer that live at the same time, as tangents


def directions_per_chunk(likelihood: nn.Module, batch: Batch, device: torch.device) -> int:
    """Directions whose tangents fit the memory, from the widest activation of one plain forward pass; at least 1."""
    widest = 1

    def measure(_: nn.Module, __: tuple[object, ...], output: object) -> None:
        nonlocal widest
        if isinstance(output, Tensor):
            widest = max(widest, output.numel() * output.element_size())

    leaves = [module for module in likelihood.modules() if next(module.children(), None) is None]
    handles = [leaf.register_forward_hook(measure) for leaf in leaves[:-1]]  # the last is the output layer
    try:
        likelihood(batch)
    finally:
        for handle in handles:
            handle.remove()
    rows, positions = batch["labels"].shape[0], batch["labels"][0].numel()
    heads = getattr(getattr(getattr(likelihood, "model", None), "config", None), "num_attention_heads", 1) or 1
    attention = rows * heads * positions * positions * 4
    return chunk_size(max(widest, attention), device, _CPU_CACHE)


def chunk_size(widest: int, device: torch.device, cache: int) -> int:
    """Directions in flight, at least 1.

    Args:
        widest (`int`): bytes of the widest tangent of one direction.
        cache (`int`): bytes of tangents that a CPU's caches hold.
    """
    each = _ALIVE * widest
    if device.type == "cuda":
        return max(1, free_bytes(device) // 2 // each)
    return max(1, min(_CPU_BUDGET // each, max(_CPU_HANDFUL, cache // each)))


def free_bytes(device: torch.device) -> int:
    """What is free on a GPU, with what torch holds there and nobody uses."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def unit(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (k, P) whose largest entries are between 1/2 and 1, and what to multiply their derivatives with (k,).

    Factors are powers of two, so that no digit is lost.
    """
    exponents = torch.frexp(directions.abs().amax(1)).exponent
    factors = torch.ldexp(torch.ones_like(directions[:, 0]), exponents)
    return directions / factors.unsqueeze(1), factors
