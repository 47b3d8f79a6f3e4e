"""Softmax attention: its VJP and JVP.

With weights p = softmax(s), s = q k^T * scaling: dp = p (ds - sum(p ds)), and the output moves by dp v + p dv.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .activations import ActivationRecorder
from .block import Block
from .norm import NormJVP, identify_norm, norm_gain, norm_vjp


__all__ = [
    "Attention", "AttentionJVP", "AttentionState", "apply_rotary", "attention_weights", "softmax_attention_vjp",
]  # fmt: skip

_KEPT = 1 << 20  # attention weights of a pass that are kept; more are recomputed for each chunk of directions


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (rows, heads, positions, size) by rotary positions; with -sin it is the inverse and the transpose."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_weights(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Return the weights (rows, heads, positions, positions) of a softmax attention; causal without a mask.

    Args:
        mask (`Tensor`, *optional*): numbers to be added, or booleans that are true where a position is attended to.
    """
    wide = query if query.dtype == torch.float64 else query.float()  # half precision would show in every weight
    logits = wide @ key.to(wide.dtype).transpose(-1, -2) * scaling
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask.dtype == torch.bool:
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # padding behind a window attends to nothing
        return weights.to(query.dtype)
    return (logits + mask).softmax(-1).to(query.dtype)


def softmax_attention_vjp(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by query, key and value, all (rows, heads, positions, size), from that by the output."""
    by_value = weights.transpose(-1, -2) @ gradient
    by_weights = gradient @ value.transpose(-1, -2)
    by_logits = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * scaling
    return by_logits @ key, by_logits.transpose(-1, -2) @ query, by_value


@dataclass
class AttentionState:
    """Tensors of an attention in one pass, (rows, heads, positions, size).

    Attributes:
        query, key, value (`Tensor`): as in the product; keys and values repeated for every query head.
        projected (`list[Tensor]`): query and key as they leave their projections.
        normed (`list[Tensor]`): query and key before rotary positions; same as `projected` without norms.
        rotary (`tuple[Tensor, Tensor]`, *optional*): cos and sin of rotary positions.
        weights (`Tensor`): (rows, heads, positions, positions).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    projected: list[Tensor]
    normed: list[Tensor]
    rotary: tuple[Tensor, Tensor] | None
    weights: Tensor

    @property
    def groups(self) -> int:
        """Number of key heads."""
        return self.projected[1].shape[1]

    @property
    def sharing(self) -> int:
        """Number of query heads per key head."""
        return self.query.shape[1] // self.groups


@dataclass(frozen=True)
class Attention(Block):
    """Softmax attention over query, key and value (three projections or one).

    Rotary positions, and norms of queries and keys, are optional.
    """

    def core(self, model: nn.Module, recorder: ActivationRecorder) -> Tensor | None:
        state = self.state(model, recorder)
        if state is None:
            return None
        return (state.weights.to(state.value.dtype) @ state.value).transpose(1, 2).flatten(2)

    def core_vjp(self, model: nn.Module, recorder: ActivationRecorder, gradient: Tensor) -> list[Tensor]:
        state = self.state(model, recorder, gradient.shape[1])
        assert state is not None  # `matches_model` is false for such attentions
        module: Any = model.get_submodule(self.path)
        query, key, value, weights = (
            part.to(gradient.dtype) for part in (state.query, state.key, state.value, state.weights)
        )
        by_output = _split_heads(gradient, module.head_dim)
        gradients = list(softmax_attention_vjp(query, key, value, weights, module.scaling, by_output))
        gradients[1:] = [part.unflatten(1, (-1, state.sharing)).sum(2) for part in gradients[1:]]
        if state.rotary is not None:
            cos, sin = (part.to(gradient.dtype) for part in state.rotary)
            gradients[:2] = [apply_rotary(part, cos, -sin) for part in gradients[:2]]
        for index, norm in enumerate(_query_and_key_norms(module)):
            if norm is not None:
                by_input = norm_vjp(norm, state.projected[index], state.normed[index], gradients[index])
                assert by_input is not None  # or there were no state
                gradients[index] = by_input
        flat = [part.transpose(1, 2).flatten(2) for part in gradients]
        return [torch.cat(flat, dim=-1)] if len(self.inputs) == 1 else flat

    def state(
        self, model: nn.Module, recorder: ActivationRecorder, positions: int | None = None
    ) -> AttentionState | None:
        """Recompute the attention at its first `positions`; None if it is of an unknown kind."""
        module: Any = model.get_submodule(self.path)
        outputs = [recorder.outputs[path][:, :positions] for path in self.inputs]
        parts = outputs if len(outputs) == 3 else list(outputs[0].chunk(3, dim=-1))
        if any(part.shape[-1] % module.head_dim for part in parts):
            return None
        if getattr(module, "attn_logit_softcapping", None) is not None:  # too weak to show where logits are small
            return None
        *projected, value = (_split_heads(part, module.head_dim) for part in parts)
        normed = list(projected)
        for index, norm in enumerate(_query_and_key_norms(module)):
            if norm is not None:
                gain = norm_gain(norm)
                if gain is None or len(gain) != module.head_dim:  # OLMo 2's norms span all heads
                    return None
                normed[index] = norm(projected[index])
                if identify_norm(norm, projected[index], normed[index]) is None:
                    return None
        query, key = normed
        kwargs = recorder.kwargs.get(self.path, {})
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            if any(part.ndim != 3 for part in rotary):
                return None
            cos, sin = (part[:, :positions].unsqueeze(1) for part in rotary)
            if cos.shape[-1] != query.shape[-1]:
                return None
            query, key, rotary = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), (cos, sin)
        sharing = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(sharing, dim=1) for part in (key, value))
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
            return None
        weights = attention_weights(query, key, float(module.scaling), _cropped(mask, query.shape[2]))
        return AttentionState(query, key, value, projected, normed, rotary, weights)


class AttentionJVP:
    """Tangents of an attention's core in one recorded pass.

    Heads that share a key are kept together, so that the key is not repeated for each of them.

    Raises:
        UnsupportedError: the attention is of an unknown kind.
    """

    def __init__(self, block: Attention, model: nn.Module, recorder: ActivationRecorder, dtype: torch.dtype):
        state = block.state(model, recorder)
        if state is None:
            raise UnsupportedError(f"{block.path} is an attention for which there is no analytic JVP")
        module = model.get_submodule(block.path)
        self._dtype, self._scaling = dtype, float(module.scaling)  # type: ignore[arg-type]
        self._groups, self._sharing = state.groups, state.sharing
        self._full_query, self._full_key = state.query, state.key[:, :: state.sharing]
        self._mask = _cropped(recorder.kwargs.get(block.path, {}).get("attention_mask"), state.query.shape[2])
        self._query, self._key, value = (
            self._together(part) for part in (state.query, self._full_key, state.value[:, :: state.sharing])
        )
        self._scaled_value = value * self._scaling
        self._kept_weights = self._together(state.weights) if state.weights.numel() <= _KEPT else None
        self._rotary = None
        if state.rotary is not None:
            cos, sin = (part.squeeze(1).unsqueeze(2) for part in state.rotary)  # (rows, positions, 1, size)
            self._rotary = cos.to(dtype), sin.to(dtype)
        self._norms = [
            None if norm is None else NormJVP(f"{block.path}.{name}", norm, x.transpose(1, 2), y.transpose(1, 2))
            for name, norm, x, y in zip(
                ("q_norm", "k_norm"), _query_and_key_norms(module), state.projected, state.normed, strict=True
            )
        ]

    def _together(self, part: Tensor) -> Tensor:
        """Turn (rows, heads, positions, size) into (rows * groups, positions of all heads that share, size)."""
        return part.unflatten(1, (self._groups, -1)).flatten(2, 3).flatten(0, 1).to(self._dtype)

    def _weights(self) -> Tensor:
        """Return the weights (rows * groups, positions of all heads that share, positions), kept if they are few."""
        if self._kept_weights is not None:
            return self._kept_weights
        key = self._full_key.repeat_interleave(self._sharing, 1)
        return self._together(attention_weights(self._full_query, key, self._scaling, self._mask))

    def jvp(self, tangents: list[Tensor | None]) -> Tensor | None:
        """Return tangents of the core's output; see `MLPJVP.jvp`."""
        if len(tangents) == 1:
            tangents = [None] * 3 if tangents[0] is None else list(tangents[0].chunk(3, dim=-1))
        query_tangents, key_tangents, value_tangents = (self._heads(part, i) for i, part in enumerate(tangents))
        if query_tangents is None and key_tangents is None and value_tangents is None:
            return None
        weights, result = self._weights(), None
        if query_tangents is not None or key_tangents is not None:
            change = self._logit_tangents(query_tangents, key_tangents)
            change.mul_(weights.unsqueeze(1))
            change.addcmul_(weights.unsqueeze(1), change.sum(-1, keepdim=True), value=-1.0)
            result = torch.bmm(change.flatten(1, 2), self._scaled_value).unflatten(1, (change.shape[1], -1))
        if value_tangents is not None:
            _, _, positions, _, _, size = value_tangents.shape
            flat = value_tangents.permute(1, 3, 2, 0, 4, 5).reshape(len(weights), positions, -1)
            by_value = torch.bmm(weights, flat).unflatten(2, (-1, size)).transpose(1, 2)
            result = by_value if result is None else result.add_(by_value)
        assert result is not None
        return self._ungrouped(result)

    def _heads(self, tangents: Tensor | None, index: int) -> Tensor | None:
        """Turn a projection's (k, rows, positions, out) into (k, rows, positions, groups, sharing heads, size).

        Norms and rotary positions are applied to queries (`index` 0) and keys (1).
        """
        if tangents is None:
            return None
        heads = tangents.unflatten(-1, (-1, self._query.shape[-1]))
        norm = self._norms[index] if index < 2 else None
        if norm is not None:
            heads = norm.jvp(heads)
        if index < 2 and self._rotary is not None:
            heads = _rotate_tangents(heads, *self._rotary)
        return heads.unflatten(-2, (self._groups, -1))

    def _logit_tangents(self, query_tangents: Tensor | None, key_tangents: Tensor | None) -> Tensor:
        """Return tangents of q k^T, (rows * groups, k, positions of sharing heads, positions).

        Tangents of all directions make one matrix per group, so that nothing is copied for each of them.
        """
        groups, result = len(self._query), None
        if query_tangents is not None:
            count, size = len(query_tangents), query_tangents.shape[-1]
            rows = query_tangents.permute(1, 3, 0, 4, 2, 5).reshape(groups, -1, size)
            result = torch.bmm(rows, self._key.mT).unflatten(1, (count, -1))
        if key_tangents is not None:
            count, size = len(key_tangents), key_tangents.shape[-1]
            columns = key_tangents.permute(1, 3, 5, 0, 2, 4).reshape(groups, size, -1)
            by_key = torch.bmm(self._query, columns).unflatten(2, (count, -1)).transpose(1, 2)
            result = by_key.contiguous() if result is None else result.add_(by_key)
        assert result is not None
        return result

    def _ungrouped(self, tangents: Tensor) -> Tensor:
        """Turn (rows * groups, k, positions of sharing heads, size) into (k, rows, positions, heads * size)."""
        heads = tangents.unflatten(0, (-1, self._groups)).unflatten(3, (self._sharing, -1))
        return heads.permute(2, 0, 4, 1, 3, 5).flatten(3, 5)


def _query_and_key_norms(attention: nn.Module) -> list[nn.Module | None]:
    return [getattr(attention, name, None) for name in ("q_norm", "k_norm")]


def _split_heads(x: Tensor, size: int) -> Tensor:
    """Turn (rows, positions, heads * size) into (rows, heads, positions, size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _cropped(mask: Tensor | None, positions: int) -> Tensor | None:
    """Return the first positions of a mask (rows, heads, positions, positions)."""
    return None if mask is None else mask[..., :positions, :positions]


def _rotate_tangents(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to (k, rows, positions, heads, size)."""
    half = heads.shape[-1] // 2
    result = heads * cos
    result[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1.0)
    result[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return result
