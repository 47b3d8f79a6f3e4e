"""Weights that FSDP2 (`fully_shard`) shards over ranks: gathered within a forward pass, sharded otherwise.

Every forward and backward pass of a sharded model is a collective, and so is gathering a weight: all ranks must take
part. Writing is not, as every rank has the full value and keeps its shard.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError


__all__ = [
    "copy_into", "full_tensor", "is_shard", "is_sharded", "plain_type", "refuse_tensor_parallelism", "reshard",
]  # fmt: skip

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 shards any of the model's weights."""
    return torch.distributed.is_available() and any(isinstance(module, FSDPModule) for module in model.modules())


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is this rank's shard of a larger one."""
    return torch.distributed.is_available() and isinstance(tensor.data, DTensor)


def reshard(model: nn.Module) -> None:
    """Shard weights that a forward pass has gathered.

    Without a backward pass, FSDP leaves some modules with full weights. They are not the optimizer's, and what is
    written to them is lost.
    """
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a shard, which is a collective; return any other tensor as it is."""
    shard: Any = tensor
    return shard.full_tensor() if is_shard(tensor) else tensor


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a full value, the same on every rank, into a tensor that may be a shard."""
    if not is_shard(target):
        target.copy_(value)
        return
    shard: Any = target
    value = value.to(target.device, target.dtype)
    # src_data_rank=None: every rank cuts its shard out of its own copy, and nothing is sent.
    shard.copy_(distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None))


def plain_type(module: nn.Module) -> type:
    """Return a module's class as it is without FSDP2, which derives one of its own from it."""
    kind = type(module)
    return kind.__mro__[2] if torch.distributed.is_available() and isinstance(module, FSDPModule) else kind


def refuse_tensor_parallelism(model: nn.Module, names: list[str]) -> None:
    """Refuse weights that are sharded by anything other than FSDP2.

    Raises:
        UnsupportedError: a sharded weight in a model without FSDP2; the message names it.
    """
    parameters = dict(model.named_parameters())
    shards = [name for name in names if is_shard(parameters[name])]
    if shards and not is_sharded(model):
        raise UnsupportedError(f"{shards[0]} is split over ranks by tensor parallelism. Train with FSDP2 or DDP")
