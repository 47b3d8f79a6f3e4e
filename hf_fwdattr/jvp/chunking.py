"""Number of directions whose tangents are propagated together, chosen by memory."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from ..models.likelihood import Batch


__all__ = ["chunk_size", "free_bytes", "in_chunks", "widest_tangent"]

# On a CPU, tangents that leave the caches cost more than running the model again for another chunk of directions. A
# chunk therefore has what fits `_CPU_CACHE` bytes, but at least `_CPU_CHUNK` directions, as fewer do not amortise the
# model's own pass.
_CPU_BUDGET = 1 << 30  # largest number of bytes of tangents in flight on a CPU
_CPU_CHUNK, _CPU_CACHE = 16, 3 << 24
_ALIVE = 6  # tangents of the widest layer that are alive at the same time


def widest_tangent(likelihood: nn.Module, batch: Batch) -> int:
    """Return the bytes of the widest activation of one plain forward pass, attention weights included."""
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
    return max(widest, rows * heads * positions * positions * 4)


def chunk_size(widest: int, device: torch.device, cache: int = _CPU_CACHE) -> int:
    """Return the number of directions in flight, at least 1.

    Args:
        widest (`int`): bytes of the widest tangent of one direction.
        cache (`int`): bytes of tangents that a CPU's caches hold.
    """
    per_direction = _ALIVE * widest
    if device.type == "cuda":
        return max(1, free_bytes(device) // 2 // per_direction)
    return max(1, min(_CPU_BUDGET // per_direction, max(_CPU_CHUNK, cache // per_direction)))


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a GPU, including the unused part of torch's own cache."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def in_chunks(derivatives: Callable[[Tensor], Tensor], directions: Tensor, chunk: int) -> Tensor:
    """Compute derivatives along (k, P) by chunks of directions: (queries, positions, k).

    Each direction is scaled by a power of two, which loses no digit, so that its largest entry lies between 1/2 and 1.

    Args:
        derivatives (`Callable`): directions (n, P) -> (n, queries, positions).

    Raises:
        NumericalError: a derivative is not finite.
    """
    parts = []
    for block in directions.split(chunk):
        exponents = torch.frexp(torch.linalg.vector_norm(block, torch.inf, 1)).exponent
        one = torch.ones_like(block[:, 0])
        values = derivatives(block * torch.ldexp(one, -exponents).unsqueeze(1))
        parts.append(values * torch.ldexp(one, exponents).to(values.dtype).view(-1, 1, 1))
    result = torch.cat(parts).permute(1, 2, 0)
    if not bool(torch.isfinite(result).all()):
        raise NumericalError("a derivative of the query's log-likelihood is not finite: is the model's own loss NaN?")
    return result
