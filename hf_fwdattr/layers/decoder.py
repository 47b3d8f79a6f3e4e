"""Decoder layers of GPT-2, and of Llama and its descendants: found by names, checked by values, and their JVP."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .activations import ActivationRecorder, NormCall
from .attention import Attention, AttentionJVP
from .block import Block
from .comparison import identical
from .linear import LinearJVPs
from .mlp import MLP, MLPJVP
from .norm import NormJVP, norm_gain
from .sensitivity import record_amplified


__all__ = ["DecoderLayer", "DecoderLayerJVP", "check_chain", "decoder_layers", "find_blocks"]

# Names of a block's input projections and output projection; of an MLP also of its activation.
_ATTENTIONS = ((("q_proj", "k_proj", "v_proj"), "o_proj"), (("c_attn",), "c_proj"))
_MLPS = ((("gate_proj", "up_proj"), "down_proj", "act_fn"), (("c_fc",), "c_proj", "act"))


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the attentions and MLPs whose layers have the names of GPT-2's or Llama's, in order."""
    blocks: list[Block] = []
    inputs: tuple[str, ...]
    for path, module in model.named_modules():
        children = {name for name, _ in module.named_children()}
        for inputs, output in _ATTENTIONS:
            if {*inputs, output} <= children and hasattr(module, "head_dim") and hasattr(module, "scaling"):
                blocks.append(Attention(path, tuple(f"{path}.{name}" for name in inputs), f"{path}.{output}"))
        for inputs, output, name in _MLPS:
            activation = getattr(module, name, None)
            if {*inputs, output} <= children and callable(activation):
                blocks.append(MLP(path, tuple(f"{path}.{name}" for name in inputs), f"{path}.{output}", activation))
    return blocks


@dataclass(frozen=True)
class DecoderLayer:
    """A layer x + attention(norm(x)), then x + mlp(norm(x)); norms after attention and MLP are optional.

    Attributes:
        path (`str`): path of the module.
        blocks (`tuple[Attention, MLP]`): in this order.
        norms (`tuple[str, ...]`): paths of its norms.
    """

    path: str
    blocks: tuple[Attention, MLP]
    norms: tuple[str, ...]

    @property
    def linears(self) -> list[str]:
        """Paths of its linear layers."""
        return [path for block in self.blocks for path in block.linears]

    @property
    def recorded_paths(self) -> list[str]:
        """Paths of all layers that an `ActivationRecorder` must record."""
        return [*self.linears, *self.norms, self.path]


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Return the decoder layers, modules with one attention and one MLP, in the order of the model's modules."""
    blocks_by_layer: dict[str, list[Block]] = {}
    for block in find_blocks(model):
        blocks_by_layer.setdefault(block.path.rpartition(".")[0], []).append(block)
    layers = []
    for path, blocks in blocks_by_layer.items():
        attentions = [block for block in blocks if isinstance(block, Attention)]
        mlps = [block for block in blocks if isinstance(block, MLP)]
        if len(attentions) == 1 and len(mlps) == 1:
            children = model.get_submodule(path).named_children()
            norms = tuple(f"{path}.{name}" for name, module in children if norm_gain(module) is not None)
            layers.append(DecoderLayer(path, (attentions[0], mlps[0]), norms))
    return layers


class _SublayerJVP:
    """Tangents of one half of a decoder layer: attention or MLP with its norms, added to the residual stream.

    Attributes:
        start, end (`Tensor`): the residual stream before it and, recomputed, after it.
    """

    def __init__(
        self, model: nn.Module, layer: DecoderLayer, block: Block, recorder: ActivationRecorder, linears: LinearJVPs
    ):
        inputs, outputs = recorder.inputs, recorder.outputs
        *self._into, self._back = (linears.at(path, inputs[path], outputs[path]) for path in block.linears)
        self._dtype = linears.dtype
        block_input, *others = (inputs[path] for path in block.inputs)
        if not all(identical(other, block_input) for other in others):
            raise UnsupportedError(f"the projections into {block.path} have different inputs")
        before = [path for path in layer.norms if identical(outputs[path], block_input)]
        if not before:
            raise UnsupportedError(f"there is no norm before {block.path}")
        self.start = inputs[before[0]]
        self._norm_before = _norm_jvp(model, before[0], recorder)
        block_output = outputs[block.output]
        after = [path for path in layer.norms if identical(inputs[path], block_output)]
        self._norm_after = _norm_jvp(model, after[0], recorder) if after else None
        self.end = self.start + (outputs[after[0]] if after else block_output)
        self._core = _core_jvp(model, block, recorder, linears.dtype)

    def jvp(self, tangents: Tensor | None, weight_tangents: list[Tensor]) -> Tensor | None:
        """Return tangents (k, rows, positions, d) of the residual stream after it; those before it are overwritten."""
        inner = None if tangents is None else self._norm_before.jvp(tangents).to(self._dtype)
        inner = self._core.jvp([linear.jvp(inner, weight_tangents) for linear in self._into])
        if self._norm_after is None and tangents is not None:
            return self._back.jvp(inner, weight_tangents, onto=tangents)
        change = self._back.jvp(inner, weight_tangents)
        if change is None:
            return tangents
        if self._norm_after is not None:
            change = self._norm_after.jvp(change)
        if tangents is not None:
            return tangents.add_(change)
        return change if change.dtype == torch.float64 else change.float()  # it is summed up over all layers


def _norm_jvp(model: nn.Module, path: str, recorder: ActivationRecorder) -> NormJVP:
    return NormJVP(path, model.get_submodule(path), recorder.inputs[path], recorder.outputs[path])


def _core_jvp(
    model: nn.Module, block: Block, recorder: ActivationRecorder, dtype: torch.dtype
) -> AttentionJVP | MLPJVP:
    """Return the JVP of a block's core, after a check that the core computes what the model computed.

    Raises:
        UnsupportedError: it does not.
    """
    core: AttentionJVP | MLPJVP
    if isinstance(block, Attention):
        core = AttentionJVP(block, model, recorder, dtype)
    else:
        assert isinstance(block, MLP)
        core = MLPJVP(block, recorder, dtype)
    matches = block.matches_model(model, recorder)
    if matches and isinstance(block, Attention):
        matches = block.matches_model(model, record_amplified(block, model, recorder))
    if not matches:
        raise UnsupportedError(f"{block.path} does not compute what its analytic form computes")
    return core


class DecoderLayerJVP:
    """Tangents of a decoder layer in one recorded pass.

    Raises:
        UnsupportedError: the layer does not compute what its analytic form computes.
    """

    def __init__(self, model: nn.Module, layer: DecoderLayer, recorder: ActivationRecorder, linears: LinearJVPs):
        self._sublayers = [_SublayerJVP(model, layer, block, recorder, linears) for block in layer.blocks]
        first, second = self._sublayers
        residuals = (
            (first.start, recorder.inputs[layer.path]), (second.start, first.end),
            (recorder.outputs[layer.path], second.end),
        )  # fmt: skip
        if not all(identical(*pair) for pair in residuals):
            raise UnsupportedError(f"{layer.path} does not add its blocks to the residual stream one after the other")
        for sublayer in self._sublayers:
            del sublayer.start, sublayer.end

    def jvp(self, tangents: Tensor | None, weight_tangents: list[Tensor]) -> Tensor | None:
        """Return tangents (k, rows, positions, d) of the layer's output; those of its input are overwritten.

        Args:
            tangents (`Tensor`, *optional*): tangents of the input; None if it does not move.
            weight_tangents (`list[Tensor]`): (k, *shape) tangents of all tracked weights.
        """
        for sublayer in self._sublayers:
            tangents = sublayer.jvp(tangents, weight_tangents)
        return tangents


def check_chain(layers: list[DecoderLayer], recorder: ActivationRecorder) -> NormCall:
    """Check that nothing lies between the layers, and one norm, which is returned, between them and the output layer.

    Raises:
        UnsupportedError: the message names the layer.
    """
    unused = [path for layer in layers for path in layer.recorded_paths if path not in recorder.outputs]
    if unused:
        raise UnsupportedError(f"{unused[0]} takes no part in the forward pass")
    for before, after in pairwise(layers):
        if recorder.outputs[before.path] is not recorder.inputs[after.path]:
            raise UnsupportedError(f"the input of {after.path} is not the output of {before.path}")
    norm, hidden = recorder.last_norm, recorder.hidden
    assert hidden is not None
    if (
        norm is None
        or norm.input is not recorder.outputs[layers[-1].path]
        or not torch.equal(norm.output[:, -hidden.shape[1] :], hidden)
    ):
        raise UnsupportedError("between the last layer and the output layer there is not exactly one norm")
    return norm
