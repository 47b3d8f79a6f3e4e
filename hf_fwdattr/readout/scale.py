"""Probes brought to one size, for arithmetic of few exponents: derivatives are linear, so nothing else changes.

Responses of rows are as small as steps of training, and float16 has nothing below 6e-8.
"""

import torch
from torch import Tensor


def unit(probes: Tensor) -> tuple[Tensor, Tensor]:
    """Probes (k, P) whose largest entries are between 1/2 and 1, and what to multiply their derivatives with (k,).

    Factors are powers of two, so that no digit is lost.
    """
    exponents = torch.frexp(probes.abs().amax(1)).exponent
    factors = torch.ldexp(torch.ones_like(probes[:, 0]), exponents)
    return probes / factors.unsqueeze(1), factors
