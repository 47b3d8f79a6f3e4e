"""Tangents through attentions and MLPs, between the projections into them and the one back."""

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..synthetic.adjoint import attention_weights, slope
from ..synthetic.block import MLP, Attention
from ..synthetic.rounding import same
from ..synthetic.trace import Seen
from .norm import Norm


class MLPPoint:
    """An MLP where a batch passes it: act(gate) * up, or act(in)."""

    def __init__(self, block: MLP, seen: Seen, dtype: torch.dtype):
        gate, *up = (seen.outputs[path] for path in block.inputs)
        slopes = [slope(block.activation, gate)]
        if up:
            slopes = [slopes[0] * up[0], block.activation(gate)]
        self._slopes = [factor.to(dtype) for factor in slopes]

    def push(self, moved: list[Tensor | None]) -> Tensor | None:
        """Tangents (k, rows, positions, size) before the output projection, from those behind the input projections.

        Tangents that are handed over are overwritten.
        """
        result = None
        for part, factor in zip(moved, self._slopes, strict=True):
            if part is not None:
                result = part.mul_(factor) if result is None else result.addcmul_(part, factor)
        return result


class AttentionPoint:
    """An attention where a batch passes it.

    With weights p = softmax(s), s = q k^T / sqrt(size): dp = p (ds - sum(p ds)), and the output moves by dp v + p dv.
    Heads that share a key are kept together, so that it is not repeated for each of them.

    Raises:
        UnsupportedError: it computes something else than softmax attention.
    """

    def __init__(self, block: Attention, model: nn.Module, seen: Seen, dtype: torch.dtype):
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
        """Tangents (k, rows, positions, size) before the output projection; see `MLPPoint`."""
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
