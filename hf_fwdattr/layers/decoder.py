"""Attentions and MLPs, found by their layers' names, written out, and checked against what the model computes."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .activations import ActivationRecorder
from .attention import Attention, AttentionJVP
from .block import Block
from .linear import LinearJVPs
from .mlp import MLP, MLPJVP
from .norm import Norm, norm_gain
from .sensitivity import sensitivity_inputs


def find_blocks(model: nn.Module) -> list[Block]:
    """Attentions and MLPs whose layers are called as those of GPT-2, or of Llama and its descendants."""
    found: list[Block] = []
    inputs: tuple[str, ...]
    for path, module in model.named_modules():
        children = {name for name, _ in module.named_children()}
        for inputs, output in ((("q_proj", "k_proj", "v_proj"), "o_proj"), (("c_attn",), "c_proj")):
            if {*inputs, output} <= children and hasattr(module, "head_dim") and hasattr(module, "scaling"):
                found.append(Attention(path, tuple(f"{path}.{name}" for name in inputs), f"{path}.{output}"))
        for inputs, output, activation in (
            (("gate_proj", "up_proj"), "down_proj", "act_fn"),
            (("c_fc",), "c_proj", "act"),
        ):
            if {*inputs, output} <= children and callable(getattr(module, activation, None)):
                paths = tuple(f"{path}.{name}" for name in inputs)
                found.append(MLP(path, paths, f"{path}.{output}", getattr(module, activation)))
    return found


@dataclass(frozen=True)
class DecoderLayer:
    """x + attention(norm(x)), and x + mlp(norm(x)) on that; norms behind attention and MLP too, or not.

    Attributes:
        path (`str`): of the module.
        blocks (`tuple[Attention, MLP]`): in this order.
        norms (`tuple[str, ...]`): paths of its norms.
    """

    path: str
    blocks: tuple[Attention, MLP]
    norms: tuple[str, ...]

    @property
    def linears(self) -> list[str]:
        """Paths of its linear layers."""
        return [path for block in self.blocks for path in (*block.inputs, block.output)]

    @property
    def watched(self) -> list[str]:
        """Paths of what is to be seen of it."""
        return [*self.linears, *self.norms, self.path]


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Decoder layers of GPT-2, or of Llama and its descendants, in the order of the model's modules."""
    homes: dict[str, list[Block]] = {}
    for block in find_blocks(model):
        homes.setdefault(block.path.rpartition(".")[0], []).append(block)
    found = []
    for path, blocks in homes.items():
        attentions = [block for block in blocks if isinstance(block, Attention)]
        mlps = [block for block in blocks if isinstance(block, MLP)]
        if len(attentions) == 1 and len(mlps) == 1:
            children = model.get_submodule(path).named_children()
            norms = tuple(f"{path}.{name}" for name, module in children if norm_gain(module) is not None)
            found.append(DecoderLayer(path, (attentions[0], mlps[0]), norms))
    return found


class _Half:
    """Attention or MLP with its norms, where a batch passes it; adds to the residual stream."""

    def __init__(
        self, model: nn.Module, layer: DecoderLayer, block: Block, seen: ActivationRecorder, linears: LinearJVPs
    ):
        self.block, self._linears = block, linears
        for path in (*block.inputs, block.output):
            linears.check(path)
            linears.compare(path, seen.inputs[path], seen.outputs[path])
        before, *others = (seen.inputs[path] for path in block.inputs)
        if not all(_identical(other, before) for other in others):
            raise UnsupportedError(f"the projections into {block.path} start from different places")
        starts = [path for path in layer.norms if _identical(seen.outputs[path], before)]
        if not starts:
            raise UnsupportedError(f"there is no norm before {block.path}")
        norm = starts[0]
        self.start = seen.inputs[norm]
        self._norm = Norm(norm, model.get_submodule(norm), self.start, seen.outputs[norm])
        self._inputs = {
            path: seen.inputs[path] for path in (*block.inputs, block.output) if path in linears.responding
        }
        end = seen.outputs[block.output]
        behind = [path for path in layer.norms if _identical(seen.inputs[path], end)]
        self._after = None
        if behind:
            self._after = Norm(behind[0], model.get_submodule(behind[0]), end, seen.outputs[behind[0]])
            end = seen.outputs[behind[0]]
        self.end = self.start + end
        self._point: MLPJVP | AttentionJVP
        if isinstance(block, MLP):
            self._point, holds = MLPJVP(block, seen, linears.dtype), block.holds(model, seen)
        else:
            assert isinstance(block, Attention)
            self._point = AttentionJVP(block, model, seen, linears.dtype)
            holds = self._point.holds(seen.inputs[block.output])
            if holds:
                loud = sensitivity_inputs(block, model, seen)
                holds = AttentionJVP(block, model, loud, linears.dtype).holds(loud.inputs[block.output])
        if not holds:
            raise UnsupportedError(f"{block.path} computes something else than is written out")

    def push(self, moved: Tensor | None, tangents: list[Tensor]) -> Tensor | None:
        """Tangents (k, rows, positions, d) of the residual stream behind it; those before it are overwritten."""
        inner = None if moved is None else self._norm.push(moved)
        if inner is not None:
            inner = inner.to(self._linears.dtype)
        parts = [self._linears.push(path, self._inputs.get(path), inner, tangents) for path in self.block.inputs]
        inner = self._point.push(parts)
        output = self.block.output
        change = self._linears.push(output, self._inputs.get(output), inner, tangents)
        if change is not None and self._after is not None:
            change = self._after.push(change)
        if change is None:
            return moved
        return _wide(change) if moved is None else moved.add_(change)


class DecoderLayerJVP:
    """A layer where a batch passes it.

    Raises:
        UnsupportedError: the model computes something else than is written out.
    """

    def __init__(self, model: nn.Module, layer: DecoderLayer, seen: ActivationRecorder, linears: LinearJVPs):
        self._halves = [_Half(model, layer, block, seen, linears) for block in layer.blocks]
        first, second = self._halves
        stations = (
            (first.start, seen.inputs[layer.path]), (second.start, first.end), (seen.outputs[layer.path], second.end)
        )  # fmt: skip
        if not all(_identical(*station) for station in stations):
            raise UnsupportedError(f"{layer.path} adds up its blocks in another way than is written out")
        for half in self._halves:
            del half.start, half.end

    def push(self, moved: Tensor | None, tangents: list[Tensor]) -> Tensor | None:
        """Tangents (k, rows, positions, d) behind the layer, from those before it, which are overwritten."""
        for half in self._halves:
            moved = half.push(moved, tangents)
        return moved


def _wide(tensor: Tensor) -> Tensor:
    """float32 or float64: the residual stream is summed up over all layers."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _identical(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit: beside a residual stream with a few huge numbers, all else would pass for rounding."""
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def check_chain(
    layers: list[DecoderLayer], seen: ActivationRecorder, norms: list[tuple[nn.Module, Tensor, Tensor]], hidden: Tensor
) -> None:
    """Refuse a model that does something between its layers, or between them and its output layer, or leaves some out.

    Raises:
        UnsupportedError: says where.
    """
    unused = [path for layer in layers for path in layer.watched if path not in seen.outputs]
    if unused:
        raise UnsupportedError(f"{unused[0]} takes no part in this pass")
    for before, after in pairwise(layers):
        if seen.outputs[before.path] is not seen.inputs[after.path]:
            raise UnsupportedError(f"{after.path} does not begin where {before.path} ends")
    last = seen.outputs[layers[-1].path]
    if not norms or norms[-1][1] is not last or not torch.equal(norms[-1][2][:, -hidden.shape[1] :], hidden):
        raise UnsupportedError("between the last layer and the output layer is something else than a norm")
