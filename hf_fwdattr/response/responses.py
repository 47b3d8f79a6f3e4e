"""The result of the passes: directions, coordinates of every row, exact responses of sources."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..bank.codes import RowCodes
from .sample_regression import SampleRegression


__all__ = ["CodeSink", "Estimation", "Responses"]

CodeSink = Callable[[RowCodes], None]  # takes the codes of the next rows, in order; on rank 0


@dataclass
class Estimation:
    """Figures with which scores are estimated from few exact ones.

    Attributes:
        outside (`Tensor`): (rows,) norm of every response's part outside the directions, in the metric 1 / D.
        error_variances (`Tensor`): (k,) mean squares of what remains to be read of a query along the directions.
        outside_variance, outside_error_variance (`float`): mean squared derivative along what is outside, for a unit
            of its squared norm: whole, and as far as a gradient predictor leaves it.
        derivative_square (`float`): mean over queries of the squared derivatives along all directions together.
        gradient_square (`float`): mean squared norm of a query's gradient over the weights of row codes.
    """

    outside: Tensor
    error_variances: Tensor
    outside_variance: float
    outside_error_variance: float
    derivative_square: float
    gradient_square: float


@dataclass
class Responses:
    """Responses of a training set; complete on rank 0, and without vectors of length P on other ranks.

    Attributes:
        directions (`Tensor`): (k, P).
        coordinates (`Tensor`): (rows, k), zero for rows that were never trained on; (rows, 1), the rows' norms, where
            the directions are the rows' own responses.
        sources (`Tensor`): (sources, P) exact responses of whole sources, scaled to equal norm; empty where there are
            too many sources.
        source_scales (`Tensor`): (sources,) factors of their scores.
        explained_variance (`float`): share of held-out score variance that the directions explain.
        exact (`bool`): whether the directions are the responses themselves.
        curvature_samples (`int`): M, per segment.
        estimation (`Estimation`, *optional*): where row codes are kept.
        predictor_explained_variance (`float`): share of the sample rows' score variance that is predicted.
        regressed (`SampleRegression`, *optional*): where it tells more of a query before it is read.
    """

    directions: Tensor
    coordinates: Tensor
    sources: Tensor
    source_scales: Tensor
    explained_variance: float
    exact: bool
    curvature_samples: int
    estimation: Estimation | None = None
    predictor_explained_variance: float | None = None
    regressed: SampleRegression | None = None

    def dense_coordinates(self) -> Tensor:
        """Return coordinates (rows, k), also where the directions are the rows themselves."""
        return self.coordinates if self.coordinates.shape[1] == len(self.directions) else self.coordinates[:, 0].diag()
