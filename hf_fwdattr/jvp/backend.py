"""Choice of the way in which directional derivatives of queries are computed."""

import logging
from collections.abc import Collection
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.compat import detached_layer
from ..models.likelihood import CAUSAL_LM, Batch, Objective
from ..models.parameters import TrackedParameters
from .analytic import AnalyticJVP, AnalyticModel, TooLarge
from .finite_difference import FiniteDifferenceJVP
from .torch_func import TorchFuncJVP


__all__ = ["METHODS", "PRECISIONS", "READOUT_OPTIONS", "Backend", "PreparedBatch"]

logger = logging.getLogger(__name__)
METHODS: dict[str, type[TorchFuncJVP | FiniteDifferenceJVP]] = {
    "jvp": TorchFuncJVP, "difference": FiniteDifferenceJVP,
}  # fmt: skip
READOUT_OPTIONS = ("auto", *METHODS)
PRECISIONS = ("auto", "full", "half")
_SMALL = 30_000_000  # weights of a model that gains nothing from half precision: its time goes elsewhere


class PreparedBatch(Protocol):
    """A batch of queries that has passed the model and can be differentiated along directions."""

    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate each token's log-likelihood along (k, P); (queries, positions, k), zero if unsupervised."""


class Backend:
    """Prepares batches of queries for directional derivatives.

    ```python
    prepared = Backend(model, parameters).prepare(batch)
    prepared.jvp(directions)  # (k, P) -> (queries, positions, k)
    ```

    Args:
        model (`nn.Module`): in evaluation mode.
        parameters (`TrackedParameters`): the tracked parameters.
        readout (`str`): `jvp` (torch's forward mode), `difference`, or `auto`: analytic for architectures that
            `layers` knows, `difference` where a layer detaches its weights (DoRA) or an operation has no derivative
            in forward mode, and `jvp` for others.
        precision (`str`): precision of the products that tangents pass through in the analytic backend. `full` is the
            model's own; `half` is bfloat16 (relative error of a score about 4e-3; sums over layers stay in float32).
            `auto` is half for rows that are chosen in two stages, whose codes have few bits anyhow, in a float32
            model of more than thirty million weights where the processor multiplies bfloat16, and full otherwise.

    Raises:
        ValueError: an unknown `readout` or `precision`.
    """

    def __init__(
        self, model: nn.Module, parameters: TrackedParameters, readout: str = "auto", precision: str = "auto"
    ):
        for option, value, allowed in (("readout", readout, READOUT_OPTIONS), ("precision", precision, PRECISIONS)):
            if value not in allowed:
                raise ValueError(f"{option}={value!r}: one of {', '.join(allowed)}")
        self.model, self.parameters, self._readout, self._precision = model, parameters, readout, precision
        self._analytic = readout == "auto"  # until the model turns out to have no analytic layers
        self._parts: AnalyticModel | None = None
        self.needs_differences = False  # until an operation turns out to have no derivative in forward mode

    def prepare(
        self, batch: Batch, two_stage: bool = False, objective: Objective = CAUSAL_LM, also: Collection[str] = ()
    ) -> PreparedBatch:
        """Prepare a batch; the model's weights must be the same whenever the result is used.

        Args:
            two_stage (`bool`): rows are being chosen in two stages; see `precision`.
            objective (`Objective`): the likelihood.
            also (`Collection[str]`): layers that are recorded, too, where derivatives are analytic; see `AnalyticJVP`.

        Raises:
            UnsupportedError: the model is in training mode or cannot be differentiated in the chosen way.
        """
        if self._analytic:
            try:
                parts = self._analytic_parts(objective)
                dtype = self._dtype(two_stage)
                return AnalyticJVP(self.model, self.parameters, objective, batch, dtype, also, parts)
            except TooLarge:
                pass
            except UnsupportedError:
                self._analytic = False
        method = self._readout
        if method == "auto":
            method = "jvp" if detached_layer(self.model) is None and not self.needs_differences else "difference"
        prepared = METHODS[method](self.model, self.parameters, objective, batch)
        if (self._readout, method) == ("auto", "jvp"):
            return _WithDifferences(self, prepared, objective, batch)
        return prepared

    def _analytic_parts(self, objective: Objective) -> AnalyticModel:
        """Return the model's parts, which are found anew where its modules have changed."""
        if self._parts is None or not self._parts.describes(self.model, objective):
            self._parts = AnalyticModel(self.model, self.parameters, objective)
        return self._parts

    @cached_property
    def _is_large(self) -> bool:
        return sum(parameter.numel() for parameter in self.model.parameters()) > _SMALL

    def _dtype(self, two_stage: bool) -> torch.dtype | None:
        """Return the dtype of analytic products; None for the model's own."""
        weight = self.model.get_parameter(self.parameters.live[0])
        if self._precision == "full" or (self._precision == "auto" and not two_stage) or weight.dtype != torch.float32:
            return None
        if self._precision == "half":
            return torch.bfloat16
        return torch.bfloat16 if self._is_large and _has_fast_bfloat16(weight.device) else None


class _WithDifferences:
    """A batch in torch's forward mode, which is read by differences where an operation has no such derivative."""

    def __init__(self, backend: Backend, prepared: PreparedBatch, objective: Objective, batch: Batch):
        self._backend, self._prepared, self._objective, self._batch = backend, prepared, objective, batch

    def jvp(self, directions: Tensor, chunk: int | None = None) -> Tensor:
        """Differentiate as a `PreparedBatch` does."""
        if not self._backend.needs_differences:
            try:
                return self._prepared.jvp(directions, chunk)
            except UnsupportedError as error:
                logger.warning("queries are read by differences, two passes for each direction: %s", error)
                self._backend.needs_differences = True
        if not isinstance(self._prepared, FiniteDifferenceJVP):
            backend = self._backend
            self._prepared = FiniteDifferenceJVP(backend.model, backend.parameters, self._objective, self._batch)
        return self._prepared.jvp(directions)


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the processor has instructions for products in bfloat16, which make it faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
