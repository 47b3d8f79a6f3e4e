"""Row responses of a bank as queries read them: from row codes, or from directions that are the rows themselves."""

from functools import cached_property

import torch
from torch import Tensor

from ..bank.bank import ResponseBank
from ..bank.codes import RowCodes
from ..bank.schema import ShardFile
from ..bank.tensors import open_shard
from .ranking import finite


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
        self._mapped: dict[str, RowCodes] = {}

    def products(self, gradients: Tensor, row_indices: Tensor | None = None) -> Tensor:
        """Return the products with gradients (queries, P) on the CPU: (queries, rows or n), float64."""
        if self._fits:  # all products take less time than a copy of some rows
            products = (gradients.float() @ self._decoded.T).double()
            return products if row_indices is None else products[:, row_indices]
        if row_indices is None:
            return torch.cat([block.products(gradients) for block in self.bank.row_codes()], dim=1)
        if self.bank.remote is not None:
            return self.codes(row_indices).products(gradients)
        return self._mapped_products(gradients, row_indices)

    def _mapped_products(self, gradients: Tensor, row_indices: Tensor) -> Tensor:
        """Return the products with rows whose codes are mapped from disk, so that they are not copied as a whole."""
        result, found = torch.zeros(len(gradients), len(row_indices), dtype=torch.float64), 0
        for file in self.bank.manifest.files_of("row_codes"):
            inside = ((row_indices >= file.first) & (row_indices < file.first + file.lines)).nonzero().flatten()
            lines = row_indices[inside] - file.first
            is_all = len(lines) == file.lines and bool((lines.diff() == 1).all())
            result[:, inside] = self._mapped_codes(file).products(gradients, None if is_all else lines)
            found += len(inside)
        if found < len(row_indices):
            self.codes(row_indices)  # which names the row that has none
        return finite(result)

    def _mapped_codes(self, file: ShardFile) -> RowCodes:
        """Return the codes of a shard, mapped once: what was looked at is not mapped again for the next query."""
        path, manifest = self.bank.path(file), self.bank.manifest  # a file that was changed is refused
        if file.name not in self._mapped:
            with open_shard(path) as shard:
                codes, scales = (shard.get_tensor(name) for name in ("codes", "scales"))
            self._mapped[file.name] = RowCodes(
                codes, scales, manifest.row_code_bits, manifest.size, self.bank.code_weights
            )
        return self._mapped[file.name]

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
