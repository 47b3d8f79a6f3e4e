"""Tracked parameters: the weights that respond to the training rows, as one flat vector theta."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import MismatchError, UnsupportedError
from .fsdp import copy_into, full_tensor, is_shard, plain_type, refuse_tensor_parallelism, reshard
from .names import adapter_of, base_model, canonical_name, is_lora_weight


__all__ = ["TrackedParameters", "is_linear"]


@dataclass(frozen=True)
class TrackedParameters:
    """The tracked parameters of one model, in the order of its `named_parameters`.

    Attributes:
        live (`tuple[str, ...]`): live names, as the model has them in memory.
        names (`tuple[str, ...]`): canonical names.
        shapes (`tuple[tuple[int, ...], ...]`): one per name.
        sizes (`tuple[int, ...]`): elements per name; they add up to `size`, the P of the formulas.
    """

    live: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(int(torch.Size(shape).numel()) for shape in self.shapes))

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    @classmethod
    def of(cls, model: nn.Module, spec: str | Sequence[str] = "auto", sharded: bool = False) -> "TrackedParameters":
        """Select parameters by `spec`: `auto`, `lora_B`, `lora`, `linear`, `trainable`, or regular expressions.

        `linear` selects trainable Linear weights. `auto` does so where there is no LoRA, and selects all that is
        trained where no Linear is (prompt tuning); where there is LoRA, it selects the matrices B and trained Linear
        weights of other layers, those of the vocabulary left out. Expressions are searched in canonical names. Of
        several adapters the active one is meant.

        Args:
            sharded (`bool`): accept weights that FSDP2 shards; `read` and `fingerprint` are then collectives.

        Raises:
            UnsupportedError: nothing is selected, or a selected weight is sharded or quantised.
        """
        reshard(model)
        has_lora = any(".lora_" in name for name, _ in model.named_parameters())
        wanted = "linear" if spec == "auto" and not has_lora else spec
        # A module that PEFT replaced by a trained copy (modules_to_save) keeps its original, which no longer runs.
        running = [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]
        chosen = [(name, parameter) for name, parameter in running if _selects(wanted, model, name)]
        if spec == "auto" and wanted == "linear" and not chosen:
            chosen = [(name, parameter) for name, parameter in running if parameter.requires_grad]
        active = [item for item in chosen if _is_active(model, item[0])]
        is_doubled = len({canonical_name(name) for name, _ in chosen}) < len(chosen)
        if active and (is_doubled or spec in ("auto", "lora_B", "lora")):
            chosen = active
        if not chosen:
            raise UnsupportedError(
                f"parameters={spec!r} selects no weight of {type(model).__name__}. {_examples(running)}"
            )
        for name, parameter in chosen:
            if not parameter.is_floating_point():
                raise UnsupportedError(f"{name} is stored as {parameter.dtype}. Quantised weights cannot be tracked")
            if is_shard(parameter) and not sharded:
                raise UnsupportedError(f"{name} is sharded over ranks. Load the saved model in one process")
        refuse_tensor_parallelism(model, [name for name, _ in chosen])
        names = tuple(canonical_name(name) for name, _ in chosen)
        doubled = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if doubled:
            raise UnsupportedError(
                f"{sorted(doubled)[0]}: several adapters have this weight and are active. A bank knows one of them. "
                "Activate one: model.set_adapter('default')"
            )
        return cls(tuple(name for name, _ in chosen), names, tuple(tuple(p.shape) for _, p in chosen))

    def tensors(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters in order; those of a sharded model are its optimizer's.

        Raises:
            MismatchError: the model no longer has one of them.
        """
        reshard(model)
        table = dict(model.named_parameters())
        for name in self.live:
            if name not in table:
                raise MismatchError(
                    f"{name}: this tracked weight is no longer in the model. Its adapter was unloaded, deleted or "
                    "renamed. Load it again, and make the pipeline anew"
                )
        return [table[name] for name in self.live]

    def read(self, model: nn.Module) -> Tensor:
        """Return a copy of theta, (P,), float32 (float64 for float64 models), on the parameters' device."""
        tensors = [full_tensor(parameter.detach()) for parameter in self.tensors(model)]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])

    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Set the model's weights to theta, (P,)."""
        for parameter, block in zip(self.tensors(model), self.split(theta), strict=True):
            copy_into(parameter, block)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Split vectors (..., P) into views (..., *shape), one per parameter."""
        blocks = vectors.split(self.sizes, dim=-1)
        return [block.reshape(*block.shape[:-1], *shape) for block, shape in zip(blocks, self.shapes, strict=True)]

    def join(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Join per-row tensors, keyed by live name, to (rows, P); the inverse of `split`."""
        return torch.cat([blocks[name].reshape(len(blocks[name]), -1) for name in self.live], dim=1)

    def fingerprint(self, model: nn.Module) -> str:
        """Return the hexadecimal sha256 of canonical names, shapes and float32 values, in the order of the names."""
        digest = hashlib.sha256()
        tensors = self.tensors(model)
        for index in sorted(range(len(self.names)), key=self.names.__getitem__):
            digest.update(f"{self.names[index]} {self.shapes[index]}\n".encode())
            digest.update(full_tensor(tensors[index].detach()).to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def _examples(weights: list[tuple[str, nn.Parameter]]) -> str:
    """Return what could be selected: trained weights, or where there are none, any."""
    trained = [canonical_name(name) for name, weight in weights if weight.requires_grad]
    if trained:
        return f"parameters='trainable' selects what is trained: {', '.join(trained[:3])}"
    names = ", ".join(canonical_name(name) for name, _ in weights[:3])
    return f"Nothing is trained. It has, for example, {names}"


def _selects(spec: str | Sequence[str], model: nn.Module, name: str) -> bool:
    """Return whether `spec` selects the parameter with the live name `name`."""
    canonical = canonical_name(name)
    if spec == "auto":
        return canonical.endswith(".lora_B.weight") or _is_trained_head(model, name)
    if spec == "lora_B":
        return canonical.endswith(".lora_B.weight")
    if spec == "lora":
        return is_lora_weight(canonical)
    if spec == "trainable":
        return model.get_parameter(name).requires_grad
    if spec == "linear":
        module = model.get_submodule(name.rpartition(".")[0])
        return name.endswith(".weight") and is_linear(module) and model.get_parameter(name).requires_grad
    patterns = [spec] if isinstance(spec, str) else spec
    return any(re.search(pattern, canonical) for pattern in patterns)


def _is_trained_head(model: nn.Module, name: str) -> bool:
    """Return whether a weight beside LoRA's is that of a trained Linear, as a classifier's new head is.

    Not one of the vocabulary's: with a hundred directions it would be as large as a hundred models.
    """
    weight, config = model.get_parameter(name), getattr(base_model(model), "config", None)
    if is_lora_weight(canonical_name(name)) or getattr(config, "vocab_size", None) in weight.shape:
        return False
    is_trained = weight.requires_grad or ".modules_to_save." in name  # loaded for a query, nothing requires gradients
    return is_trained and name.endswith(".weight") and is_linear(model.get_submodule(name.rpartition(".")[0]))


def _is_active(model: nn.Module, name: str) -> bool:
    """Return whether the adapter of a weight is the active one; True for weights of no adapter."""
    path, adapter = adapter_of(name)
    active = getattr(model.get_submodule(path), "active_adapters", None)
    return adapter is None or active is None or adapter in active


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is exactly a Linear (x W^T + b) or the Conv1D of GPT-2 (x W + b), no subclass."""
    kind = plain_type(module)
    return kind is nn.Linear or (kind.__name__ == "Conv1D" and hasattr(module, "nf"))
