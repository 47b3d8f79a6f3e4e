"""Which weights respond: their canonical names, and the one flat vector theta that the mathematics speaks of."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .fsdp import copy_into, is_piece, plain_type, refuse_foreign_pieces, reshard, whole
from .names import canonical_name


@dataclass(frozen=True)
class Parameters:
    """The responding parameters of one model, in the order of its own `named_parameters`.

    Attributes:
        live (`tuple[str, ...]`): names in the model at hand.
        names (`tuple[str, ...]`): canonical names.
        shapes (`tuple[tuple[int, ...], ...]`): one per name; their sizes add up to `size`, the P of the formulas.
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
    def of(cls, model: nn.Module, spec: str | Sequence[str] = "auto", sharded: bool = False) -> "Parameters":
        """Select by `spec`: `auto`, `lora_B`, `lora`, `linear`, `trainable`, or regular expressions on names.

        `linear` means trainable Linear weights; the expressions are searched in canonical names.

        Args:
            sharded (`bool`): accept weights that FSDP2 shards. `read` and `fingerprint` are collective then.

        Raises:
            UnsupportedError: nothing was selected, or the model is sharded or quantised where it would respond.
        """
        reshard(model)
        wanted = spec
        if spec == "auto":
            wanted = "lora_B" if any(".lora_" in name for name, _ in model.named_parameters()) else "linear"
        # A module that PEFT replaced by a trained copy (modules_to_save) keeps its original, which no longer runs.
        running = [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]
        chosen = [(name, parameter) for name, parameter in running if _selects(wanted, model, name)]
        if not chosen:
            raise UnsupportedError(
                f"parameters={spec!r} selects no weight of {type(model).__name__}; "
                f"it has, for example, {', '.join(canonical_name(n) for n, _ in list(model.named_parameters())[:3])}"
            )
        for name, parameter in chosen:
            if not parameter.is_floating_point():
                raise UnsupportedError(f"{name} is stored as {parameter.dtype}: quantised weights cannot respond")
            if is_piece(parameter) and not sharded:
                raise UnsupportedError(f"{name} is sharded over ranks: load the saved model in one process")
        refuse_foreign_pieces(model, [name for name, _ in chosen])
        names = tuple(canonical_name(name) for name, _ in chosen)
        doubled = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if doubled:
            raise UnsupportedError(f"several adapters share the weight {sorted(doubled)[0]}; keep one active adapter")
        return cls(tuple(name for name, _ in chosen), names, tuple(tuple(p.shape) for _, p in chosen))

    def tensors(self, model: nn.Module) -> list[nn.Parameter]:
        """The live parameters, in order; of a sharded model those that its optimizer has."""
        reshard(model)
        table = dict(model.named_parameters())
        return [table[name] for name in self.live]

    def read(self, model: nn.Module) -> Tensor:
        """theta: a float32 (float64 for float64 models) copy, shape (P,), on the parameters' device."""
        tensors = [whole(parameter.detach()) for parameter in self.tensors(model)]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])

    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Set the model's weights to theta, shape (P,)."""
        for parameter, block in zip(self.tensors(model), self.split(theta), strict=True):
            copy_into(parameter, block)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Views of (..., P) as one (..., *shape) tensor per parameter."""
        blocks = vectors.split(self.sizes, dim=-1)
        return [block.reshape(*block.shape[:-1], *shape) for block, shape in zip(blocks, self.shapes, strict=True)]

    def join(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """(rows, P) from per-row tensors keyed by live name, the inverse of `split`."""
        return torch.cat([blocks[name].reshape(len(blocks[name]), -1) for name in self.live], dim=1)

    def fingerprint(self, model: nn.Module) -> str:
        """sha256 over canonical names, shapes and float32 values, in the order of the names; hexadecimal."""
        digest = hashlib.sha256()
        tensors = self.tensors(model)
        for index in sorted(range(len(self.names)), key=self.names.__getitem__):
            digest.update(f"{self.names[index]} {self.shapes[index]}\n".encode())
            digest.update(whole(tensors[index].detach()).to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def _selects(spec: str | Sequence[str], model: nn.Module, name: str) -> bool:
    """Whether `spec` names the parameter called `name` in the model."""
    canonical = canonical_name(name)
    if spec == "lora_B":
        return canonical.endswith(".lora_B.weight")
    if spec == "lora":
        return bool(re.search(r"\.lora_[AB]\.weight$", canonical))
    if spec == "trainable":
        return model.get_parameter(name).requires_grad
    if spec == "linear":
        owner = model.get_submodule(name.rpartition(".")[0])
        return name.endswith(".weight") and is_linear(owner) and model.get_parameter(name).requires_grad
    patterns = [spec] if isinstance(spec, str) else spec
    return any(re.search(pattern, canonical) for pattern in patterns)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b (Linear) or x W + b (the Conv1D of GPT-2), in that exact way."""
    kind = plain_type(module)
    return kind is nn.Linear or (kind.__name__ == "Conv1D" and hasattr(module, "nf"))
