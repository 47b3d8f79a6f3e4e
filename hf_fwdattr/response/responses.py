"""The result of the passes: directions, coordinates of every row, exact responses of sources."""

from dataclasses import dataclass

from torch import Tensor

from ..bank.codes import RowCodes


__all__ = ["Responses"]


@dataclass
class Responses:
    """Responses of a training set; complete on rank 0, and without vectors of length P on other ranks.

    Attributes:
        directions (`Tensor`): (k, P).
        coordinates (`Tensor`): (rows, k), zero for rows that were never trained on.
        sources (`Tensor`): (sources, P) exact responses of whole sources, scaled to equal norm; empty where there are
            too many sources.
        source_scales (`Tensor`): (sources,) factors of their scores.
        explained_variance (`float`): share of held-out score variance that the directions explain.
        exact (`bool`): whether the directions are the responses themselves.
        curvature_samples (`int`): M, per segment.
        row_codes (`RowCodes`, *optional*): the responses of all rows in 8 bits, if the bank keeps them.
        sample_scores (`Tensor`, *optional*): (rows, rows) scores of rows as queries, with the row codes; float64.
    """

    directions: Tensor
    coordinates: Tensor
    sources: Tensor
    source_scales: Tensor
    explained_variance: float
    exact: bool
    curvature_samples: int
    row_codes: RowCodes | None = None
    sample_scores: Tensor | None = None

    def products(self, gradients: Tensor) -> Tensor:
        """Return inner products (queries, rows) of gradients (queries, P) with the rows' responses, float64."""
        if self.row_codes is not None:
            return self.row_codes.products(gradients)
        return (gradients.to(self.directions.dtype) @ self.directions.T).double() @ self.coordinates.double().T
