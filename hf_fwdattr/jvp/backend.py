"""Which way a model is read along directions: written out, by torch's forward mode, or by differences."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..models.likelihood import CAUSAL_LM, Batch
from ..models.parameters import Parameters
from . import finite_difference, torch_func
from .analytic import AnalyticJVP, TooLarge


READOUTS = {"jvp": torch_func.read, "difference": finite_difference.read}
WAYS = ("auto", *READOUTS)
PRECISIONS = ("auto", "full", "half")
_SMALL = 30_000_000  # weights of a model that gains nothing from half precision: its time goes elsewhere


class Backend:
    """Reads batches of queries.

    Args:
        model (`nn.Module`): in evaluation mode.
        way (`str`): `jvp`, `difference`, or `auto`: written out where the model is of a kind that `tangent` knows,
            else `jvp`.
        precision (`str`): of the products that directions pass through where they are written out. `full` is the model's
            own; `half` is bfloat16 (relative error of a score about 4e-3, sums over layers in float32). `auto` is half
            for rows that are picked in stages, whose responses have eight bits anyhow, of a float32 model of more than
            thirty million weights where the processor multiplies bfloat16, and full for all else.
    """

    def __init__(self, model: nn.Module, parameters: Parameters, way: str = "auto", precision: str = "auto"):
        for what, given, known in (("readout", way, WAYS), ("precision", precision, PRECISIONS)):
            if given not in known:
                raise ValueError(f"{what}={given!r}: one of {', '.join(known)}")
        self.model, self.parameters, self._way, self._precision = model, parameters, way, precision
        self._known = True  # whether the model is of a kind that is written out; found out when it is first read

    def opened(self, batch: Batch, staged: bool = False) -> Callable[[Tensor], Tensor]:
        """What reads a batch along directions: (k, P) -> (queries, positions, k). The weights must not change meanwhile.

        Args:
            staged (`bool`): rows are being picked, in several goes; see `precision`.
        """
        if self._way == "auto" and self._known:
            try:
                return AnalyticJVP(self.model, self.parameters, CAUSAL_LM, batch, self._dtype(staged)).along
            except TooLarge:
                pass
            except UnsupportedError:
                self._known = False
        read = READOUTS["jvp" if self._way == "auto" else self._way]
        return partial(read, self.model, self.parameters, CAUSAL_LM, batch)

    def _dtype(self, staged: bool) -> torch.dtype | None:
        """None: the model's own."""
        weight = self.parameters.tensors(self.model)[0]
        if self._precision == "full" or (self._precision == "auto" and not staged) or weight.dtype != torch.float32:
            return None
        if self._precision == "half":
            return torch.bfloat16
        large = sum(parameter.numel() for parameter in self.model.parameters()) > _SMALL
        return torch.bfloat16 if large and _multiplies_bfloat16(weight.device) else None


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether there is an instruction for it, so that it is quicker than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
