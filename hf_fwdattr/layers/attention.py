"""Derivatives of single building blocks, written out: what an error at a block's end means at its beginning.

Each is local to one block and needs only what a forward pass computed; no graph is built and nothing is chained
through the layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .activations import ActivationRecorder
from .block import Block, same
from .norm import Norm, identify_norm, norm_gain, norm_vjp


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (rows, heads, positions, size); with -sin it turns back, which is also its transpose."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """(rows, heads, positions, positions) of a softmax attention; causal where no mask is given.

    Args:
        mask (`Tensor`, *optional*): to be added, or booleans that are true where a position may look.
    """
    wide = query if query.dtype == torch.float64 else query.float()  # half precision would show in every weight
    logits = wide @ key.to(wide.dtype).transpose(-1, -2) * scaling
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask.dtype == torch.bool:
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # padding behind a window sees nothing at all
        return weights.to(query.dtype)
    return (logits + mask).softmax(-1).to(query.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float, error: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors at query, key and value, from the error (rows, heads, positions, size) at the attention's output."""
    at_value = weights.transpose(-1, -2) @ error
    at_weights = error @ value.transpose(-1, -2)
    at_logits = weights * (at_weights - (at_weights * weights).sum(-1, keepdim=True)) * scaling
    return at_logits @ key, at_logits.transpose(-1, -2) @ query, at_value


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

    def inner(self, model: nn.Module, trace: ActivationRecorder) -> Tensor | None:
        state = self.state(model, trace, None)
        return (
            None if state is None else (state.weights.to(state.value.dtype) @ state.value).transpose(1, 2).flatten(2)
        )

    def pull(self, model: nn.Module, trace: ActivationRecorder, error: Tensor) -> list[Tensor]:
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
            errors[:2] = [apply_rotary(part, cos, -sin) for part in errors[:2]]
        for index, name in enumerate(("q_norm", "k_norm")):
            norm = getattr(module, name, None)
            if norm is not None:
                before = norm_vjp(norm, state.raw[index], state.normed[index], errors[index])
                assert before is not None  # or `holds` had been false
                errors[index] = before
        flat = [part.transpose(1, 2).flatten(2) for part in errors]
        return [torch.cat(flat, dim=-1)] if len(self.inputs) == 1 else flat

    def state(self, model: nn.Module, trace: ActivationRecorder, positions: int | None) -> State | None:
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
                gain = norm_gain(norm)
                if gain is None or len(gain) != module.head_dim:  # others take all heads together, as OLMo 2's do
                    return None
                normed[index] = norm(raw[index])
                if identify_norm(norm, raw[index], normed[index]) is None:
                    return None
        query, key, turn = *normed, given.get("position_embeddings")
        if turn is not None:
            if any(part.ndim != 3 for part in turn):
                return None
            cos, sin = (part[:, :positions].unsqueeze(1) for part in turn)
            if cos.shape[-1] != query.shape[-1]:
                return None
            query, key, turn = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), (cos, sin)
        sharing = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(sharing, dim=1) for part in (key, value))
        mask = given.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 4:
                return None
            mask = mask[..., : query.shape[2], : query.shape[2]]
        weights = attention_weights(query, key, float(module.scaling), mask)
        return State(query, key, value, raw, normed, turn, weights)


def _heads(x: Tensor, size: int) -> Tensor:
    """(rows, heads, positions, size) of (rows, positions, heads * size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


class AttentionJVP:
    """An attention where a batch passes it.

    With weights p = softmax(s), s = q k^T / sqrt(size): dp = p (ds - sum(p ds)), and the output moves by dp v + p dv.
    Heads that share a key are kept together, so that it is not repeated for each of them.

    Raises:
        UnsupportedError: it computes something else than softmax attention.
    """

    def __init__(self, block: Attention, model: nn.Module, seen: ActivationRecorder, dtype: torch.dtype):
        state = block.state(model, seen, None)
        if state is None:
            raise UnsupportedError(f"{block.path} is an attention that is not written out")
        module = model.get_submodule(block.path)
        self._dtype, self._scaling = dtype, float(module.scaling)  # type: ignore[arg-type]
        self._groups = state.raw[1].shape[1]
        sharing = state.query.shape[1] // self._groups
        self._query, self._key, self._value = state.query, state.key[:, ::sharing], state.value[:, ::sharing]
        mask = seen.arguments.get(block.path, {}).get("attention_mask")
        self._mask = None if mask is None else mask[..., : self._query.shape[2], : self._key.shape[2]]
        self._turn = None
        if state.turn is not None:
            cos, sin = (part.squeeze(1).unsqueeze(2) for part in state.turn)  # (rows, positions, 1, size)
            self._turn = cos.to(dtype), sin.to(dtype)
        self._norms = [
            Norm(f"{block.path}.{name}", getattr(module, name), state.raw[index].transpose(1, 2),
                 state.normed[index].transpose(1, 2)) if getattr(module, name, None) is not None else None
            for index, name in enumerate(("q_norm", "k_norm"))
        ]  # fmt: skip

    def _weights(self) -> Tensor:
        """(rows, heads, positions, positions looked at); not kept, as it is the largest of all."""
        sharing = self._query.shape[1] // self._groups
        return attention_weights(self._query, self._key.repeat_interleave(sharing, 1), self._scaling, self._mask)

    def holds(self, inner: Tensor) -> bool:
        """Whether what is written out is what the model handed to its output projection."""
        sharing = self._query.shape[1] // self._groups
        own = self._weights().to(self._value.dtype) @ self._value.repeat_interleave(sharing, 1)
        return same(own.transpose(1, 2).flatten(2), inner)

    def push(self, moved: list[Tensor | None]) -> Tensor | None:
        """Tangents (k, rows, positions, size) before the output projection; see `MLPJVP`."""
        if len(moved) == 1:
            moved = [None] * 3 if moved[0] is None else list(moved[0].chunk(3, dim=-1))
        query, key, value = (self._meeting(part, index) for index, part in enumerate(moved))
        if query is None and key is None and value is None:
            return None
        own_query, own_key, own_value, weights = (
            part.unflatten(1, (self._groups, -1)).flatten(2, 3).flatten(0, 1).to(self._dtype)
            for part in (self._query, self._key, self._value, self._weights())
        )  # (rows * groups, positions of all heads that share, size)
        sharing = self._query.shape[1] // self._groups
        result = None
        if query is not None or key is not None:
            change = self._logits(query, key, own_query, own_key).mul_(self._scaling)
            change.mul_(weights.unsqueeze(1))
            change.addcmul_(weights.unsqueeze(1), change.sum(-1, keepdim=True), value=-1.0)
            result = torch.bmm(change.flatten(1, 2), own_value).unflatten(1, (change.shape[1], -1))
        if value is not None:
            other = torch.matmul(weights.unsqueeze(1), value)
            result = other if result is None else result.add_(other)
        assert result is not None
        return self._flat(result, sharing)

    def _meeting(self, part: Tensor | None, index: int) -> Tensor | None:
        """(rows * groups, k, positions of the heads that share, size) of a projection's (k, rows, positions, out)."""
        if part is None:
            return None
        size = self._query.shape[-1]
        heads = part.unflatten(-1, (-1, size))
        norm = self._norms[index] if index < 2 else None
        if norm is not None:
            heads = norm.push(heads)
        if index < 2 and self._turn is not None:
            heads = _turned(heads, *self._turn)
        grouped = heads.unflatten(-2, (self._groups, -1))  # (k, rows, positions, groups, sharing, size)
        return grouped.permute(1, 3, 0, 4, 2, 5).flatten(3, 4).flatten(0, 1)

    def _logits(self, query: Tensor | None, key: Tensor | None, own_query: Tensor, own_key: Tensor) -> Tensor:
        """(rows * groups, k, positions of the heads that share, positions): tangents of q k^T."""
        result = None
        if query is not None:
            result = torch.bmm(query.flatten(1, 2), own_key.mT).unflatten(1, (query.shape[1], -1))
        if key is not None:
            other = torch.matmul(own_query.unsqueeze(1), key.mT)
            result = other if result is None else result.add_(other)
        assert result is not None
        return result

    def _flat(self, result: Tensor, sharing: int) -> Tensor:
        """(k, rows, positions, heads * size) of (rows * groups, k, positions of the heads that share, size)."""
        heads = result.unflatten(0, (-1, self._groups)).unflatten(3, (sharing, -1))
        return heads.permute(2, 0, 4, 1, 3, 5).flatten(3, 5)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (k, rows, positions, heads, size)."""
    half = heads.shape[-1] // 2
    result = heads * cos
    result[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1.0)
    result[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return result
