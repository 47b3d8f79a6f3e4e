"""Row codes: vectors of length P in 1, 2, 4 or 8 bits a number, so that a bank can keep every row's response.

A vector's numbers are dealt out to blocks in turn, their signs are flipped at random and blocks go through a Hadamard
transform: whatever the numbers were, afterwards they look like draws from one normal distribution, and one step serves
all of them. Numbers are rounded to 2^b levels that are evenly spaced at the best distance for a normal distribution
(Max 1960, "Quantizing for minimum distortion"). Each block has a scale, so chosen that the code's inner product with
the vector itself is the vector's squared norm: no inner product is too small on average.

Parameters may be weighed before. The noise of an inner product of a code of w * r with g / w grows with the product of
both norms, which is least where w^2 is the usual size of a gradient's number over that of a response's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .schema import BITS, code_blocks


__all__ = ["NOISE", "RowCodes", "rotate", "unrotate"]

_CHUNK = 1 << 20  # numbers that are coded or decoded together, so that they stay in the processor's cache
_SIGNS = 0x5EED  # of the sign flips; part of the format
_STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}  # best distance of levels for a standard normal distribution
# Variance of an inner product with a code, for a vector in no relation to its error: this, times |w code|^2 over P,
# times |vector / w|^2.
NOISE = {1: 0.363, 2: 0.1188, 4: 0.0116, 8: 0.000104}


def rotate(vectors: Tensor) -> Tensor:
    """Flip signs and transform: (n, P) -> (n, blocks, block) in float32, with norms and inner products unchanged."""
    size = vectors.shape[1]
    count, block = code_blocks(size)
    padded = torch.nn.functional.pad(vectors.float(), (0, count * block - size))
    return _transform((padded * _signs(count * block)).unflatten(1, (block, count)).transpose(1, 2).contiguous())


def unrotate(rotated: Tensor, size: int) -> Tensor:
    """Return (n, P) with P = `size`: the inverse of `rotate`."""
    return (_transform(rotated).transpose(1, 2).flatten(1) * _signs(rotated.shape[1] * rotated.shape[2]))[:, :size]


@dataclass
class RowCodes:
    """A matrix (rows, P) in a few bits a number.

    Attributes:
        codes (`Tensor`): (rows, bytes), uint8. Within a block of B numbers byte j holds the numbers j, j + B b / 8,
            j + 2 B b / 8, ... from the lowest bits up.
        scales (`Tensor`): (rows, blocks), float32; level k of 0 ... 2^b - 1 stands for 2 k + 1 - 2^b times the scale.
        bits (`int`): b.
        size (`int`): P.
        weights (`Tensor`, *optional*): (P,) that numbers were multiplied with before they were rotated.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    size: int
    weights: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor, bits: int, weights: Tensor | None = None) -> "RowCodes":
        """Encode a matrix (rows, P), which may be mapped from disk and is read by blocks of rows."""
        rows, size = matrix.shape
        count, block = code_blocks(size)
        codes = torch.empty(rows, count * block * bits // 8, dtype=torch.uint8)
        result = cls(codes, torch.empty(rows, count), bits, size, weights)
        width = max(1, _CHUNK // max(size, 1))
        for start in range(0, rows, width):
            part = matrix[start : start + width].float()
            result.codes[start : start + width], result.scales[start : start + width] = _encode(
                rotate(part if weights is None else part * weights), bits
            )
        return result

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, lines: slice | Tensor) -> "RowCodes":
        """Return some of the rows."""
        return RowCodes(self.codes[lines], self.scales[lines], self.bits, self.size, self.weights)

    def decode(self) -> Tensor:
        """(rows, P), float32."""
        rows, start = torch.empty(len(self), self.size), 0
        for part in self._parts():
            levels = torch.cat(list(part._levels()), -1).mul_(2)
            levels -= part.scales.unsqueeze(-1) * ((1 << self.bits) - 1)
            rows[start : start + len(part)] = unrotate(levels, self.size)
            start += len(part)
        return rows if self.weights is None else rows.div_(self.weights)

    def products(self, vectors: Tensor, lines: Tensor | None = None) -> Tensor:
        """(queries, rows), float64: inner products with vectors (queries, P), by blocks of rows.

        The vectors are rotated in place of the rows.

        Args:
            lines (`Tensor`, *optional*): (n,) indices of rows, all by default; they are read block by block, so that
                codes may be mapped from disk.
        """
        rotated = rotate(vectors if self.weights is None else vectors / self.weights)
        pieces = [piece.flatten(1).T for piece in rotated.split(max(1, rotated.shape[2] * self.bits // 8), dim=2)]
        sums, top = rotated.sum(2).T, (1 << self.bits) - 1
        count, start = len(self) if lines is None else len(lines), 0
        result = torch.zeros(len(vectors), count, dtype=torch.float64)
        scratch = torch.empty(0)
        for part in self._parts(lines):
            if len(scratch) < len(part):
                scratch = torch.empty(len(part), *rotated.shape[1:-1], len(part.codes[0]) // rotated.shape[1])
            # A level k stands for (2 k - top) times the scale: the second term needs no level.
            products = part.scales @ sums * -top
            for levels, piece in zip(part._levels(scratch[: len(part)]), pieces, strict=True):
                products.addmm_(levels.flatten(1), piece, alpha=2)
            result[:, start : start + len(part)] = products.T
            start += len(part)
        return result

    def _parts(self, lines: Tensor | None = None) -> Iterator["RowCodes"]:
        width = max(1, _CHUNK // max(self.size, 1))
        for start in range(0, len(self) if lines is None else len(lines), width):
            chosen = slice(start, start + width)
            yield self[chosen] if lines is None else self[lines[chosen]]

    def _levels(self, scratch: Tensor | None = None) -> Iterator[Tensor]:
        """Yield levels k times their scales, (rows, blocks, B b / 8) for each place within a byte.

        Args:
            scratch (`Tensor`, *optional*): of that shape in float32; where each is written in turn.
        """
        count, mask = self.scales.shape[1], (1 << self.bits) - 1
        codes, scales = self.codes.unflatten(1, (count, -1)), self.scales.unsqueeze(-1)
        for shift in range(0, 8, self.bits):
            levels = codes >> shift if shift else codes
            if shift + self.bits < 8:  # no bits are left above
                levels = levels & mask
            yield (levels.float() if scratch is None else scratch.copy_(levels)).mul_(scales)


def _encode(rotated: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes (n, bytes) and scales (n, blocks) of rotated rows (n, blocks, block)."""
    tiny = torch.finfo(torch.float32).tiny
    step = rotated.square().mean(-1, keepdim=True).sqrt().mul_(_STEPS[bits]).clamp_(min=tiny)
    top = (1 << bits) - 1
    levels = (rotated / step + (top + 1) / 2).floor_().clamp_(0, top)
    odd = levels * 2 - top
    scales = rotated.square().sum(-1) / (odd * rotated).sum(-1).clamp(min=tiny)
    whole = levels.to(torch.uint8).unflatten(2, (8 // bits, -1))
    codes = torch.zeros_like(whole[:, :, 0])
    for place in range(8 // bits):
        codes |= whole[:, :, place] << (place * bits)
    return codes.flatten(1), scales.nan_to_num_(0.0, 0.0, 0.0)


def _transform(blocks: Tensor) -> Tensor:
    """Multiply blocks (n, blocks, block) by the symmetric orthogonal Hadamard matrix."""
    exponent = round(math.log2(blocks.shape[-1]))
    left, right = _hadamard(exponent // 2), _hadamard(exponent - exponent // 2)
    squares = (blocks.reshape(-1, len(right)) @ right).view(-1, len(left), len(right))
    return torch.bmm(left.expand(len(squares), -1, -1), squares).view(blocks.shape)


@lru_cache
def _hadamard(exponent: int) -> Tensor:
    result = torch.ones(1, 1)
    for _ in range(exponent):
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)]) / math.sqrt(2)
    return result


@lru_cache
def _signs(count: int) -> Tensor:
    """Return `count` signs, the same ones on every machine: the raw bits of PCG64 are part of no release's whims."""
    words = np.random.PCG64(_SIGNS).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


assert set(_STEPS) == set(NOISE) == set(BITS)
