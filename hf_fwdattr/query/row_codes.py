"""Row responses of a bank as queries read them: from row codes, or from directions that are the rows themselves."""

from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import ResponseBank
from ..bank.codes import RowCodes


__all__ = ["HeldRowCodes"]

_HELD = 1 << 28  # bytes of decoded row codes that are held between queries, at most


class HeldRowCodes:
    """Row codes of a bank: products with them, and decoded rows.

    Few are decoded once and held; of many only those asked for are read.

    Args:
        bank (`ResponseBank`): a bank with row codes.
    """

    def __init__(self, bank: ResponseBank):
        self.bank = bank

    def products(self, gradients: Tensor, row_indices: Tensor | None = None) -> Tensor:
        """Return the products with gradients (queries, P) on the CPU: (queries, rows or n), float64."""
        if self._fits:  # all products take less time than a copy of some rows
            products = (gradients.float() @ self._decoded.T).double()
            return products if row_indices is None else products[:, row_indices]
        if row_indices is not None:
            return self.codes(row_indices).products(gradients)
        return torch.cat([block.products(gradients) for block in self.bank.row_codes()], dim=1)

    def square(self, gradient: Tensor) -> float:
        """Return the squared norm of a gradient (1, P) as the noise of codes sees it, over their weights."""
        weights = self.bank.code_weights
        return float((gradient if weights is None else gradient / weights).double().square().sum())

    def squares(self, rows: Tensor) -> Tensor:
        """Return the squared norms (n,) of decoded rows (n, P) as the noise of codes sees them, float64."""
        weights = self.bank.code_weights
        return (rows if weights is None else rows * weights).square().sum(1).double()

    def codes(self, row_indices: Tensor) -> RowCodes:
        """Return the codes of rows (n,)."""
        return self.bank.codes_of(row_indices.tolist())

    def rows(self, row_indices: Tensor) -> Tensor:
        """Return decoded row responses (n, P)."""
        return self._decoded[row_indices] if self._fits else self.bank.decode_rows(row_indices.tolist())

    @cached_property
    def _decoded(self) -> Tensor:
        return torch.cat([block.decode() for block in self.bank.row_codes()])

    @property
    def _fits(self) -> bool:
        """Return whether the codes are here, and few enough to be held decoded."""
        return self.bank.remote is None and 4 * self.bank.manifest.row_codes * self.bank.manifest.size <= _HELD
