"""Rows' own responses in a bank: products with them, some of them, and the sums along which first looks err."""

from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import ResponseBank


_UNPACKED = 1 << 31  # bytes of responses that may be held as float32 between queries
_LEAST = 32  # sums that are made together: the leading ones of more are the same


class BankResponses:
    """Of a bank that keeps them.

    Args:
        bank (`ResponseBank`): whose manifest says `responses`.
    """

    def __init__(self, bank: ResponseBank):
        self.bank = bank
        self._sums: tuple[Tensor, Tensor] | None = None

    @cached_property
    def kernel(self) -> Tensor | None:
        """(rows, rows) how first looks' errors go together, float32, see `kriging`; None where the bank has it not."""
        kernel = self.bank.error_covariance()
        return None if kernel is None else kernel.float()

    @cached_property
    def _unpacked(self) -> Tensor:
        return torch.cat([block.decode() for block in self.bank.row_codes()])

    @cached_property
    def _eigenvectors(self) -> Tensor:
        """(rows, rows) of the kernel, leading ones first: rows are at most `sample_rows`, which takes a second."""
        assert self.kernel is not None
        return torch.linalg.eigh(self.kernel)[1].flip(1)

    @property
    def _holds(self) -> bool:
        """Whether they are few enough to be kept unpacked between queries."""
        return 4 * self.bank.manifest.row_codes * self.bank.manifest.size <= _UNPACKED

    def products(self, gradients: Tensor) -> Tensor:
        """(queries, rows), float64: with gradients (queries, P) on the CPU."""
        if self._holds:
            return (gradients.float() @ self._unpacked.T).double()
        return torch.cat([block.products(gradients) for block in self.bank.row_codes()], dim=1)

    def of(self, places: Tensor) -> Tensor:
        """(n, P): those of the rows at these positions."""
        return self._unpacked[places] if self._holds else self.bank.decode_rows(places.tolist())

    def sums(self, count: int) -> tuple[Tensor, Tensor]:
        """Weights (rows, n) and the sums of responses with them (n, P), n at most `count`: the kernel's leading
        eigenvectors, so that reading along them tells most about all rows at once.
        """
        assert self.kernel is not None
        count = min(count, len(self.kernel))
        if self._sums is None or self._sums[0].shape[1] < count:
            wanted = min(max(count, _LEAST), len(self.kernel))
            weights = self._eigenvectors[:, :wanted]
            total, at = torch.zeros(wanted, self.bank.manifest.size), 0
            blocks = [self._unpacked] if self._holds else (block.decode() for block in self.bank.row_codes())
            for block in blocks:
                total += weights[at : at + len(block)].T @ block
                at += len(block)
            self._sums = weights, total
        weights, total = self._sums
        return weights[:, :count].double(), total[:count]
