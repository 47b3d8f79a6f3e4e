"""Row codes of a bank, held for queries."""

from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import ResponseBank


__all__ = ["HeldRowCodes"]

_DECODED = 1 << 31  # largest number of bytes of decoded row codes that are held between queries
_AT_ONCE = 32  # linear combinations made at a time, so that they do not depend on how many were wanted before


class HeldRowCodes:
    """Row codes of a bank: products with them, decoded rows, and the linear combinations that tell most.

    Few codes are decoded once and held; many are streamed from disk.

    Args:
        bank (`ResponseBank`): a bank with row codes.
    """

    def __init__(self, bank: ResponseBank):
        self.bank = bank
        self._combinations: list[Tensor] = []  # combined row responses (_AT_ONCE, P), leading ones first

    @cached_property
    def error_covariance(self) -> Tensor | None:
        """(rows, rows) covariance of the gradient predictor's errors, float32; None if the bank does not hold it."""
        covariance = self.bank.error_covariance()
        return None if covariance is None else covariance.float()

    def products(self, gradients: Tensor) -> Tensor:
        """Return the products with gradients (queries, P) on the CPU: (queries, rows), float64."""
        if self._fits:
            return (gradients.float() @ self._decoded.T).double()
        return torch.cat([block.products(gradients) for block in self.bank.row_codes()], dim=1)

    def rows(self, row_indices: Tensor) -> Tensor:
        """Return decoded row responses (n, P)."""
        return self._decoded[row_indices] if self._fits else self.bank.decode_rows(row_indices.tolist())

    def combinations(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the linear combinations of rows whose scores tell most about all rows at once.

        Their weights are the leading eigenvectors of the error covariance.

        Returns:
            Weights (rows, n), and the combined row responses (n, P), with n at most `count`.
        """
        vectors = self._eigenvectors
        count = min(count, len(vectors))
        while _AT_ONCE * len(self._combinations) < count:
            weights = vectors[:, _AT_ONCE * len(self._combinations) :][:, :_AT_ONCE]
            total, start = torch.zeros(weights.shape[1], self.bank.manifest.size), 0
            blocks = [self._decoded] if self._fits else (block.decode() for block in self.bank.row_codes())
            for block in blocks:
                total += weights[start : start + len(block)].T @ block
                start += len(block)
            self._combinations.append(total)
        return vectors[:, :count].double(), torch.cat(self._combinations)[:count]

    @cached_property
    def _decoded(self) -> Tensor:
        return torch.cat([block.decode() for block in self.bank.row_codes()])

    @property
    def _fits(self) -> bool:
        """Return whether the codes are few enough to be held decoded."""
        return 4 * self.bank.manifest.row_codes * self.bank.manifest.size <= _DECODED

    @cached_property
    def _eigenvectors(self) -> Tensor:
        """(rows, rows), leading ones first; a second's work, as a bank holds the codes of few thousand rows."""
        assert self.error_covariance is not None
        return torch.linalg.eigh(self.error_covariance)[1].flip(1)
