"""Weights that FSDP2 (`fully_shard`) splits over ranks: whole for a while in a forward pass, in pieces otherwise.

Of a sharded model every forward and backward is a collective, and so is reading a weight as a whole: all ranks must
do it together. Writing is not, as every rank is handed the whole and keeps its piece.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError


if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 handles any of the model's weights."""
    return torch.distributed.is_available() and any(isinstance(module, FSDPModule) for module in model.modules())


def is_piece(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's piece of a greater one."""
    return torch.distributed.is_available() and isinstance(tensor.data, DTensor)


def reshard(model: nn.Module) -> None:
    """Back to pieces: after a forward pass without a backward one, FSDP leaves some modules with whole weights, which
    are no longer those that the optimizer knows, and writing to which is forgotten.
    """
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor as it would be on one rank; a collective if it is a piece, and the tensor itself if not."""
    piece: Any = tensor
    return piece.full_tensor() if is_piece(tensor) else tensor


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole value, the same on every rank, into a tensor that may be a piece."""
    if not is_piece(target):
        target.copy_(value)
        return
    piece: Any = target
    moved = value.to(target.device, target.dtype)
    # src_data_rank=None: every rank cuts its piece out of its own copy, and nothing is sent.
    piece.copy_(distribute_tensor(moved, piece.device_mesh, piece.placements, src_data_rank=None))


def plain_type(module: nn.Module) -> type:
    """A module's class as it was before FSDP2 put a class of its own in front of it."""
    kind = type(module)
    return kind.__mro__[2] if torch.distributed.is_available() and isinstance(module, FSDPModule) else kind


def refuse_foreign_pieces(model: nn.Module, names: list[str]) -> None:
    """Refuse weights that are split by anything else than FSDP2.

    Raises:
        UnsupportedError: names the first one.
    """
    table = dict(model.named_parameters())
    split = [name for name in names if is_piece(table[name])]
    if split and not is_sharded(model):
        raise UnsupportedError(f"{split[0]} is split over ranks by tensor parallelism; train with FSDP2 or DDP")
