"""Attentions and MLPs, found by their layers' names, written out, and checked against what the model computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adjoint import attention, attention_weights, rotated, slope
from .anatomy import back_through
from .rounding import same
from .trace import Seen, before_norm, form_of, gain_of


@dataclass(frozen=True)
class Block:
    """A block whose inputs' errors follow from the error at its end.

    Attributes:
        path (`str`): of the module.
        inputs (`tuple[str, ...]`): paths of the projections into the block.
        output (`str`): path of the projection back to the residual stream.
    """

    path: str
    inputs: tuple[str, ...]
    output: str

    def inner(self, model: nn.Module, trace: Seen) -> Tensor | None:
        """What goes into the output projection, written out; None where that cannot be said."""
        raise NotImplementedError

    def pull(self, model: nn.Module, trace: Seen, error: Tensor) -> list[Tensor]:
        """Errors at the outputs of `inputs`, from the error before the output projection."""
        raise NotImplementedError

    def holds(self, model: nn.Module, trace: Seen) -> bool:
        """Whether the block, written out, is what the model computed, at every position."""
        seen = trace.inputs[self.output]
        layer: Any = model.get_submodule(self.output)
        base = getattr(layer, "base_layer", layer)
        width = base.weight.shape[0] if isinstance(base, nn.Linear) else getattr(base, "nf", 1)
        if back_through(layer, seen.new_zeros(1, width)) is None:
            return False
        inner = self.inner(model, trace)
        return inner is not None and same(inner.to(seen.dtype), seen)

    def errors(self, model: nn.Module, trace: Seen, error: Tensor) -> dict[str, Tensor]:
        """Path of each input -> error (rows, positions, out) at its output, from the error at the block's end."""
        inner = back_through(model.get_submodule(self.output), error)
        assert inner is not None  # or `holds` had been false
        return dict(zip(self.inputs, self.pull(model, trace, inner), strict=True))


@dataclass(frozen=True)
class MLP(Block):
    """act(gate) * up, or act(in)."""

    activation: Callable[[Tensor], Tensor]

    def inner(self, model: nn.Module, trace: Seen) -> Tensor | None:
        opened = self.activation(trace.outputs[self.inputs[0]])
        return opened if len(self.inputs) == 1 else opened * trace.outputs[self.inputs[1]]

    def pull(self, model: nn.Module, trace: Seen, error: Tensor) -> list[Tensor]:
        outputs = [trace.outputs[path][:, : error.shape[1]].to(error.dtype) for path in self.inputs]
        opening = slope(self.activation, outputs[0])
        if len(outputs) == 1:
            return [error * opening]
        return [error * outputs[1] * opening, error * self.activation(outputs[0])]


@dataclass
class State:
    """What an attention had in its hands, by heads: (rows, heads, positions, size).

    Attributes:
        query, key, value (`Tensor`): as they meet; keys and values once per query head.
        raw (`list[Tensor]`): query and key as they came out of their projections.
        normed (`list[Tensor]`): after their norms, before they are turned; the same as `raw` without norms.
        turn (`tuple[Tensor, Tensor]`, *optional*): cos and sin of rotary positions.
        weights (`Tensor`): (rows, heads, positions, positions).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    raw: list[Tensor]
    normed: list[Tensor]
    turn: tuple[Tensor, Tensor] | None
    weights: Tensor


@dataclass(frozen=True)
class Attention(Block):
    """Softmax attention over query, key and value (three projections or one).

    With rotary positions or none, and norms of queries and keys or none.
    """

    def inner(self, model: nn.Module, trace: Seen) -> Tensor | None:
        state = self.state(model, trace, None)
        return (
            None if state is None else (state.weights.to(state.value.dtype) @ state.value).transpose(1, 2).flatten(2)
        )

    def pull(self, model: nn.Module, trace: Seen, error: Tensor) -> list[Tensor]:
        state = self.state(model, trace, error.shape[1])
        assert state is not None
        module: Any = model.get_submodule(self.path)
        query, key, value, weights = (
            part.to(error.dtype) for part in (state.query, state.key, state.value, state.weights)
        )
        errors = list(attention(query, key, value, weights, module.scaling, _heads(error, module.head_dim)))
        sharing = state.query.shape[1] // state.raw[1].shape[1]  # heads with one key: their errors are added up
        errors[1:] = [part.unflatten(1, (-1, sharing)).sum(2) for part in errors[1:]]
        if state.turn is not None:
            cos, sin = (part.to(error.dtype) for part in state.turn)
            errors[:2] = [rotated(part, cos, -sin) for part in errors[:2]]
        for index, name in enumerate(("q_norm", "k_norm")):
            norm = getattr(module, name, None)
            if norm is not None:
                before = before_norm(norm, state.raw[index], state.normed[index], errors[index])
                assert before is not None  # or `holds` had been false
                errors[index] = before
        flat = [part.transpose(1, 2).flatten(2) for part in errors]
        return [torch.cat(flat, dim=-1)] if len(self.inputs) == 1 else flat

    def state(self, model: nn.Module, trace: Seen, positions: int | None) -> State | None:
        """At so many positions, or all; None if something is unusual."""
        module: Any = model.get_submodule(self.path)
        given = trace.arguments.get(self.path, {})
        outputs = [trace.outputs[path][:, :positions] for path in self.inputs]
        parts = outputs if len(outputs) == 3 else list(outputs[0].chunk(3, dim=-1))
        if any(part.shape[-1] % module.head_dim for part in parts):
            return None
        if getattr(module, "attn_logit_softcapping", None) is not None:  # too weak to show where logits are small
            return None
        *raw, value = (_heads(part, module.head_dim) for part in parts)
        normed = list(raw)
        for index, name in enumerate(("q_norm", "k_norm")):
            norm = getattr(module, name, None)
            if norm is not None:
                gain = gain_of(norm)
                if gain is None or len(gain) != module.head_dim:  # others take all heads together, as OLMo 2's do
                    return None
                normed[index] = norm(raw[index])
                if form_of(norm, raw[index], normed[index]) is None:
                    return None
        query, key, turn = *normed, given.get("position_embeddings")
        if turn is not None:
            if any(part.ndim != 3 for part in turn):
                return None
            cos, sin = (part[:, :positions].unsqueeze(1) for part in turn)
            if cos.shape[-1] != query.shape[-1]:
                return None
            query, key, turn = rotated(query, cos, sin), rotated(key, cos, sin), (cos, sin)
        sharing = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(sharing, dim=1) for part in (key, value))
        mask = given.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 4:
                return None
            mask = mask[..., : query.shape[2], : query.shape[2]]
        weights = attention_weights(query, key, float(module.scaling), mask)
        return State(query, key, value, raw, normed, turn, weights)


def blocks_of(model: nn.Module) -> list[Block]:
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


def _heads(x: Tensor, size: int) -> Tensor:
    """(rows, heads, positions, size) of (rows, positions, heads * size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
