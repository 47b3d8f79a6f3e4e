"""What the passes end in: directions, coordinates of every row, exact responses of sources."""

from dataclasses import dataclass

from torch import Tensor

from ..bank.codes import RowCodes


@dataclass
class Responses:
    """Result of the passes; whole on rank 0, and on other ranks without lines of length P.

    Attributes:
        directions (`Tensor`): (k, P).
        coordinates (`Tensor`): (rows, k), zero for rows that were never trained on.
        sources (`Tensor`): (sources, P) exact responses of whole sources, scaled to equal norm; no lines where they
            were not asked for.
        source_scales (`Tensor`): (sources,) what their scores must be multiplied with.
        kept (`float`): share of held-out score variance that the directions keep.
        exact (`bool`): whether the directions are the responses themselves.
        curvature_samples (`int`): per segment.
        own (`RowCodes`, *optional*): the responses themselves in 8 bits, if they were to be kept.
        scores (`Tensor`, *optional*): (rows, rows) of rows as queries, where own responses are kept; float64.
    """

    directions: Tensor
    coordinates: Tensor
    sources: Tensor
    source_scales: Tensor
    kept: float
    exact: bool
    curvature_samples: int
    own: RowCodes | None = None
    scores: Tensor | None = None

    def products(self, gradients: Tensor) -> Tensor:
        """(queries, rows), float64: products of gradients (queries, P) with the rows' responses, as well as known."""
        if self.own is not None:
            return self.own.products(gradients)
        return (gradients.to(self.directions.dtype) @ self.directions.T).double() @ self.coordinates.double().T
